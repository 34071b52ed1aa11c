"""Words of the translation, from a vector (UGT of Mao et al. 2021, arXiv 2105.13856: SMLM and XTR in one).

For aligned sentences x and y one token m of one of them, say x, is masked. With p(v) = softmax(E . LN(swish(A v)) + bias) from a
sentence's vector alone, E the encoder's own embeddings:
    loss = mean over pairs of  KL(t_x || p(vector of x with the mask)) + KL(t_y || p(vector of y))
    t_x = 1/2 [the token m] + 1/2 uniform over the tokens of y,    t_y = uniform over the tokens of x
Which token is a function of step, group and place. `masked: false` is XTR alone: both vectors predict the other's tokens. Unlike
in the paper's code a token that is repeated counts as often, so that targets are distributions; y predicts x as it was, without
the mask; and punctuation may be masked.

`language_embedding` puts an embedding of the language that is predicted beside the vector, as in the successor for many languages
(EMS, Mao et al. 2022, arXiv 2205.15744). `level: document` predicts from the vector of a document the tokens of the other document
of its pair; it needs no aligned sentences. Which sentences are aligned says `aligned.py`.

Legend: A pairs of this chunk, S its sentences in document order, N sentences of its stream, K tokens to predict.
"""

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from hmde_dist.command import InputError
from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.aligned import Aligned, aligned_sentences, pairs_of
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, total_count
from hmde_dist.objectives.vocabulary import VocabularyHead
from hmde_dist.recipe import Count, ObjectiveSection
from hmde_dist.stream import draws
from hmde_dist.stream.batch import PackedBatch, Segments


class Settings(ObjectiveSection):
    needs_tokens: ClassVar[bool] = True
    level: Literal["sentence", "document"] = Field("sentence", description="whose vectors predict")
    masked: bool = Field(
        True, description="mask a token of each pair, a second look at half of the sentences; false = XTR alone",
        validate_default=True,
    )  # fmt: skip
    language_embedding: Count | None = Field(
        None, description="width of the embedding of the language that is predicted (EMS: 128); none = without"
    )

    @property
    def needs_sentences(self) -> bool:
        return self.level == "sentence"

    @field_validator("masked")
    @classmethod
    def _masks_sentences(cls, masked: bool, info: ValidationInfo) -> bool:
        if masked and info.data.get("level") == "document":
            raise ValueError("tokens are masked in sentences; with level: document say masked: false")
        return masked


class Tokens:
    """Where the tokens of a chunk's sentences lie in its stream.

    Attributes:
        stream_rows: [S] place among the sentences of the stream of each sentence in document order.
        sizes, starts: [N] tokens with special ones, and the first of them, of each sentence of the stream.
    """

    def __init__(self, batch: PackedBatch):
        self.sizes = np.repeat(*np.array(batch.lower.runs).T)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.stream_rows = batch.sentence_rows.cpu().numpy()
        self.counts = np.array(batch.sentence_counts, dtype=np.int64)

    def of_documents(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of `documents`, sentence in document order) of all sentences of documents."""
        sizes = self.counts[documents]
        number = np.repeat(np.arange(len(documents)), sizes)
        first = (np.cumsum(self.counts) - self.counts)[documents]
        return number, np.arange(len(number)) - (np.cumsum(sizes) - sizes - first)[number]

    def of_sentences(self, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of `sentences`, place in the stream) of all content tokens of sentences in document order."""
        rows = self.stream_rows[sentences]
        sizes = self.sizes[rows] - 2
        number = np.repeat(np.arange(len(sentences)), sizes)
        return number, np.arange(len(number)) - (np.cumsum(sizes) - sizes - self.starts[rows] - 1)[number]


class Masked(NamedTuple):
    """A token of each pair, and the vector of its sentence without it."""

    rows: Tensor  # int64 [A] which of the 2A predictions
    vectors: Tensor  # [A, W]
    tokens: Tensor  # int64 [A] that were masked


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        if settings.masked and encoder.config.mask_token_id is None:
            raise InputError(
                "objectives: translation_tokens needs a tokenizer with a mask token: build the shards again with one that "
                "has it, or set masked: false"
            )
        more = settings.language_embedding or 0
        self.language = nn.Embedding(len(encoder.config.languages), more) if more else None
        self.head = VocabularyHead(encoder, "silu", encoder.config.hidden_size + more)

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        device, tokens = output.sentences.device, Tokens(batch)
        if self.settings.level == "document":
            x, y = pairs_of(batch)
            # A document without a sentence has no tokens to be predicted.
            whole = np.minimum(*(np.array(batch.sentence_counts)[side] for side in (x, y))) > 0
            x, y = x[whole], y[whole]
            vectors = output.documents[torch.from_numpy(np.concatenate([x, y])).to(device)]
            predicting, predicted = tokens.of_documents(np.concatenate([y, x]))
            languages = batch.facts.languages[np.concatenate([y, x])]
            masked = None
        else:
            aligned = aligned_sentences(batch)
            own, predicted = (
                np.concatenate(s) for s in ((aligned.first, aligned.second), (aligned.second, aligned.first))
            )
            vectors, predicting = output.sentences[torch.from_numpy(own).to(device)], np.arange(len(own))
            languages = batch.facts.languages[np.concatenate([aligned.second_documents, aligned.first_documents])]
            masked = self.masks(encoder, batch, tokens, aligned) if self.settings.masked else None
            if masked is not None:
                vectors = vectors.index_copy(0, masked.rows, masked.vectors.to(vectors.dtype))
        if self.language is not None:
            vectors = torch.cat([self.language(torch.from_numpy(languages).to(device)), vectors], dim=1)
        targets = targets_of(batch, tokens, predicting, predicted, masked, len(vectors))
        likelihoods, right = self.head(encoder, vectors, targets.rows, targets.tokens)
        losses = targets.shares * (targets.shares.log() - likelihoods)
        sizes = torch.bincount(targets.rows, minlength=len(vectors))
        # Sums of pieces, not scattered ones, whose order a GPU leaves to chance.
        sums, hits = (
            torch.segment_reduce(part, "sum", lengths=sizes, unsafe=True) for part in (losses, right.to(losses.dtype))
        )
        return {"losses": sums, "right": (hits > 0).float()}

    def masks(self, encoder: HMDEModel, batch: PackedBatch, tokens: Tokens, aligned: Aligned) -> Masked:
        """One masked token of each pair, and the vector of its sentence, encoded once more."""
        facts, number = batch.facts, len(aligned.places)
        key = facts.step, facts.groups[aligned.first_documents], aligned.places
        second = draws.bits(0, "masked side", *key) % np.uint64(2) == 1
        sentences = tokens.stream_rows[np.where(second, aligned.second, aligned.first)]
        # Not without any sentence: all ranks call the encoder equally often.
        read = sentences if number else np.zeros(1, np.int64)
        order = np.argsort(tokens.sizes[read], kind="stable")
        read, sizes = read[order], tokens.sizes[read][order]
        at = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - tokens.starts[read], sizes)
        drawn = draws.bits(0, "masked word", *key) % (tokens.sizes[sentences] - 2).astype(np.uint64)
        places = tokens.starts[sentences] + 1 + drawn.astype(np.int64)
        inverse = np.argsort(order)[:number]
        inside = (np.cumsum(sizes) - sizes)[inverse] + 1 + drawn.astype(np.int64)  # of the masks in the new stream
        device = batch.ids.device
        at, inside, inverse, places, rows = (
            torch.from_numpy(part).to(device)
            for part in (at, inside, inverse, places, np.arange(number) + second * number)
        )
        ids = batch.ids[at].index_fill(0, inside, encoder.config.mask_token_id)
        segments = Segments.of(sizes).map(lambda starts: starts.to(device))
        vectors = encoder.encode_tokens(ids, batch.positions[at], segments)[inverse]
        return Masked(rows, vectors, batch.ids[places])

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        pairs = total_count(len(rows["losses"]) / 2, ranks, rows["losses"].device)
        count = max(1.0, pairs) / ranks.size
        name = "aligned" if self.settings.level == "sentence" else "pairs"
        watched = {name: rows["losses"].new_tensor(pairs)}
        return Loss(rows["losses"].sum() / count, (rows["right"].sum() / (2 * count)).detach(), 0, watched)


class Targets(NamedTuple):
    """Distributions over the vocabulary, row after row, of which only the tokens that have a share are named."""

    rows: Tensor  # int64 [K] which prediction
    tokens: Tensor  # int64 [K], different ones in a row
    shares: Tensor  # [K], 1 in all in a row


def targets_of(
    batch: PackedBatch,
    tokens: Tokens,
    predicting: np.ndarray,
    predicted: np.ndarray,
    masked: Masked | None,
    number: int,
) -> Targets:
    """What each of `number` predictions is to be: uniform over the tokens of sentences, half of it moved to a masked token.

    Args:
        predicting, predicted: which prediction is one of the tokens of which sentence.
    """
    sentence, places = tokens.of_sentences(predicted)
    device = batch.ids.device
    rows = torch.from_numpy(predicting[sentence]).to(device)
    found = batch.ids[torch.from_numpy(places).to(device)]
    masked_rows, masked_tokens = (masked.rows, masked.tokens) if masked else (rows[:0], found[:0])
    vocabulary = 1 << 32
    keys = torch.cat([rows, masked_rows]) * vocabulary + torch.cat([found, masked_tokens])
    # A token that occurs again in a row adds to its share. Whole numbers are counted: no sum depends on an order.
    unique, inverse = torch.unique(keys, return_inverse=True)
    times, times_masked = (
        torch.bincount(part, minlength=len(unique)) for part in inverse.split([len(rows), len(masked_rows)])
    )
    of_row, halves = unique // vocabulary, torch.ones(number, device=device).index_fill(0, masked_rows, 0.5)
    shares = times * (halves / torch.bincount(rows, minlength=number))[of_row] + 0.5 * times_masked
    return Targets(of_row, unique % vocabulary, shares)
