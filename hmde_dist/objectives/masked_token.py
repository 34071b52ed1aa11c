"""Masked language modelling on the sentence encoder (Devlin et al. 2019, arXiv 1810.04805), with the language and script embeddings
of LangSAMP (Liu et al. 2025, arXiv 2409.18199).

Of `share` of the tokens of a sentence 80 % become the mask, 10 % a random token, 10 % stay; the encoder reads those sentences once
more, without padding, and predicts the tokens from its states h there:
    loss = mean over masked tokens of -log softmax(E . LN(gelu(A o)) + bias),   o = h + language[l] + script[s]
E: the encoder's own embeddings. The embeddings of language and script start at 0 and exist in this head only, so that h need
not tell languages apart; o = h without `language_embeddings`. Which tokens are masked depends on step, document and place, not on
ranks or chunks. Keeps the encoder a language model while other objectives pull at its vectors.

Legend: N sentences of the stream, M masked tokens.
"""

from typing import ClassVar, NamedTuple

import langcodes
import numpy as np
import torch
from pydantic import Field
from torch import nn

from hmde_dist.command import InputError
from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.model.packed_attention import encode_stream
from hmde_dist.objectives import objective
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, documents_of_sentences, whole_count
from hmde_dist.objectives.vocabulary import VocabularyHead
from hmde_dist.recipe import ObjectiveSection, Share
from hmde_dist.stream import draws
from hmde_dist.stream.batch import PackedBatch, Segments

REPLACED, RANDOM = 0.8, 0.1  # of the masked tokens


class Settings(ObjectiveSection):
    needs_tokens: ClassVar[bool] = True
    share: Share = Field(0.15, description="of the tokens of a sentence that are masked")
    sentences: Share = Field(
        1.0, description="share of the sentences that are read once more with masks; its cost is that of a forward pass"
    )
    language_embeddings: bool = Field(False, description="of language and script, added before the head (LangSAMP)")


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        if encoder.config.mask_token_id is None:
            raise InputError(
                "objectives: masked_token needs a tokenizer with a mask token: build the shards again with one that has it"
            )
        self.head = VocabularyHead(encoder, "gelu")
        self.scripts = None
        if settings.language_embeddings:
            names = [script_of(language) for language in encoder.config.languages]
            self.scripts = torch.tensor([sorted(set(names)).index(name) for name in names])
            width = encoder.config.hidden_size
            self.language = nn.Parameter(torch.zeros(len(names), width))
            self.script = nn.Parameter(torch.zeros(len(set(names)), width))

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        device, vocabulary = batch.ids.device, encoder.lower.config.vocab_size
        again = read_again(batch, self.settings, encoder.config.mask_token_id, vocabulary)
        places, masked, shown, languages = (
            torch.from_numpy(part).to(device) for part in (again.places, again.masked, again.shown, again.languages)
        )
        ids = batch.ids[places]
        targets = ids[masked]
        ids = ids.scatter(0, masked, torch.where(shown < 0, targets, shown))
        segments = Segments.of(again.sizes).map(lambda starts: starts.to(device))
        states = encode_stream(encoder.lower, encoder.stream, ids, batch.positions[places], segments)[masked]
        if self.scripts is not None:
            states = states + self.language[languages] + self.script[self.scripts.to(device)[languages]]
        likelihoods, right = self.head(encoder, states, torch.arange(len(states), device=device), targets)
        return {"losses": -likelihoods, "right": right.float()}

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        count = whole_count(len(rows["losses"]), ranks, rows["losses"].device)
        loss = rows["losses"].sum() / count
        return Loss(loss, (rows["right"].sum() / count).detach(), 0, {})


def script_of(language: str) -> str:
    """The script a language is written in, as ISO 15924 has it: `sr-latn` -> Latn; "" where none is known."""
    try:
        return langcodes.get(language).maximize().script or ""
    except langcodes.LanguageTagError:
        return ""


class Again(NamedTuple):
    """What is read once more."""

    places: np.ndarray  # [T] in the batch's stream: whole sentences, in its order, at least one
    sizes: np.ndarray  # tokens of each of these sentences
    masked: np.ndarray  # [M] of the T, which tokens are to be predicted
    shown: np.ndarray  # [M] what stands there instead; -1 = the token itself
    languages: np.ndarray  # [M]


def read_again(batch: PackedBatch, settings: Settings, mask: int, vocabulary: int) -> Again:
    """Draw sentences and tokens of a batch."""
    facts, counts = batch.facts, np.array(batch.sentence_counts, dtype=np.int64)
    owner = documents_of_sentences(batch).numpy()
    place = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    # One more of each at the end: number -1 is a sentence that nothing reads, see `stream.batch.pack`.
    groups, languages, place = (np.append(part, 0) for part in (facts.groups[owner], facts.languages[owner], place))
    lengths = np.repeat(*np.array(batch.lower.runs).T)
    numbers_N = np.full(len(lengths), -1)
    numbers_N[batch.sentence_rows.cpu().numpy()] = np.arange(len(owner))

    def key(numbers: np.ndarray) -> tuple:
        return facts.step, groups[numbers], languages[numbers], place[numbers]

    read = draws.uniform(0, "read again", *key(numbers_N)) < settings.sentences
    read[0] |= not read.any()  # all ranks call the encoder equally often
    sizes = lengths[read]
    numbers = np.repeat(numbers_N[read], sizes)
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_content = (position > 0) & (position < np.repeat(sizes, sizes) - 1) & (numbers >= 0)
    drawn = draws.uniform(0, "masked token", *key(numbers), position)
    masked = np.flatnonzero(is_content & (drawn < settings.share))
    keys = *key(numbers[masked]), position[masked]
    kind, token = draws.uniform(0, "shown", *keys), draws.bits(0, "random token", *keys) % np.uint64(vocabulary)
    shown = np.where(kind < REPLACED, mask, np.where(kind < REPLACED + RANDOM, token.astype(np.int64), -1))
    starts = np.cumsum(lengths) - lengths
    return Again(np.repeat(starts[read], sizes) + position, sizes, masked, shown, languages[numbers[masked]])
