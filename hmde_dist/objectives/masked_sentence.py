"""Masked sentence prediction (MSM, Zhang et al. 2023, arXiv 2302.01626): the document encoder predicts the vector of a sentence
that it does not see.

A sentence of a document is replaced by a learned vector; the state of the document encoder there, q, must find the sentence's own
vector, k, among those of other sentences of the same language (all ranks), with l_ij = q_i . k_j / temperature:
    L_i = -log e^{l_ii} / (e^{l_ii} + sum_{j in doc, j != i} e^{l_ij - b_i} + sum_{j not in doc} e^{l_ij})
    b_i = bias * (mean_{j in doc, j != i} l_ij - mean_{j not in doc} l_ij), without gradient.
Heads on both sides, separate. Needs no links between languages. As in the paper's code every sentence of a short document is masked
in turn; of a longer one, `copies` sentences. Unlike there, heads are normalised by layer (batch statistics would depend on
chunks), and a document of fewer sentences is no padded block.

Legend: M masked sentences of this rank, S sentences of this rank, N of all ranks.
"""

from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import (
    Loss,
    Rows,
    documents_of_sentences,
    gather_ragged,
    sums_over_rows,
    whole_count,
)
from hmde_dist.recipe import Count, ObjectiveSection
from hmde_dist.stream import draws
from hmde_dist.stream.batch import PackedBatch, Segments


class Settings(ObjectiveSection):
    needs_layers: ClassVar[bool] = True
    temperature: Annotated[float, Field(gt=0)] = 0.1
    bias: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="how far negatives of the same document are pulled to the others' level; 0 = plain cross-entropy",
    )
    copies: Count = Field(
        8, description="masked sentences of a document, at most; each is a pass through the document encoder"
    )


class Head(nn.Sequential):
    """Two layers on sentence vectors."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        width = encoder.config.hidden_size
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.query_head, self.key_head = Head(width), Head(width)

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        facts, counts = batch.facts, np.array(batch.sentence_counts)
        documents, places = chosen_sentences(counts, facts, self.settings.copies)
        device = output.sentences.device
        queries = F.normalize(
            self.query_head(self.predictions(encoder, output.sentences, counts, documents, places)), dim=-1
        )
        keys = F.normalize(self.key_head(output.sentences), dim=-1)
        owner = documents_of_sentences(batch).numpy()
        first = np.cumsum(counts) - counts
        # Numbers of documents are those of the rank, so that they mean the same in every chunk; places are inside them.
        known = {
            "query_document": facts.numbers[documents],
            "query_place": places,
            "query_language": facts.languages[documents],
            "query_group": facts.groups[documents],
            "key_document": facts.numbers[owner],
            "key_place": np.arange(len(owner)) - first[owner],
            "key_language": facts.languages[owner],
            "key_group": facts.groups[owner],
        }
        return {"queries": queries, "keys": keys} | {
            name: torch.from_numpy(fact.astype(np.int64)).to(device) for name, fact in known.items()
        }

    def predictions(self, encoder: HMDEModel, sentences_SW: Tensor, counts, documents, places) -> Tensor:
        """States [M, W] of the document encoder at the masked sentences: one copy of its document for each."""
        order = np.argsort(counts[documents], kind="stable")  # equal lengths side by side
        sizes = counts[documents][order] + 1
        positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        first = np.cumsum(counts) - counts
        rows = np.repeat(first[documents][order], sizes) + positions - 1
        total = len(sentences_SW)
        rows[positions == np.repeat(places[order] + 1, sizes)] = total  # the mask, behind the sentences
        rows[positions == 0] = total + 1  # [DCLS], behind the mask
        at = np.empty(len(order), dtype=np.int64)
        at[order] = np.cumsum(sizes) - sizes + places[order] + 1
        rows, positions, at = (torch.from_numpy(part).to(sentences_SW.device) for part in (rows, positions, at))
        segments = Segments.of(sizes).map(lambda starts: starts.to(sentences_SW.device))
        inputs = torch.cat([sentences_SW, self.mask[None].to(sentences_SW.dtype)])
        _, states = encoder.upper(inputs, rows, positions, at[:0], segments)
        return states[at]

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        settings = self.settings
        # A padded key has language -1, which no query has.
        keys = gather_ragged(rows["keys"], ranks, 0.0)
        offset = ranks.rank * (1 << 32)  # documents of different ranks are different
        key_facts = [
            gather_ragged(fact, ranks, -1)
            for fact in (
                rows["key_document"] + offset,
                *(rows[f"key_{name}"] for name in ("place", "language", "group")),
            )
        ]
        facts = (rows[f"query_{name}"] for name in ("place", "language", "group"))
        queries = [rows["queries"], rows["query_document"] + offset, *facts]
        total, plain, right = sums_over_rows(masked_sentence_losses, queries, keys, key_facts, settings)
        count = whole_count(len(rows["queries"]), ranks, keys.device)
        # The loss with bias 0 is comparable between settings.
        return Loss(total / count, (right / count).detach(), len(keys) - 1, {"plain": (plain / count).detach()})


def chosen_sentences(counts: np.ndarray, facts, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """(document, place) [M] of the sentences that are masked: all of short documents, `copies` drawn of each other.

    A document of one sentence has none: nothing would be left to predict it from.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    key = draws.bits(0, "masked sentence", facts.step, facts.groups[owner], facts.languages[owner], place)
    order = np.lexsort((key, owner))
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = place  # the how manyth of its document by the draw
    chosen = (rank < copies) & (counts[owner] > 1)
    return owner[chosen], place[chosen]


def masked_sentence_losses(
    queries: Tensor,
    documents: Tensor,
    places: Tensor,
    languages: Tensor,
    groups: Tensor,
    keys: Tensor,
    key_facts: list[Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, loss without bias, and whether the right key scores highest, of each query [m].

    Args:
        queries: [m, W]; keys: [N, W], unit vectors, exactly one of them the query's own.
        documents, places, languages, groups: of each query; key_facts: the same of each key.
    """
    scores = queries @ keys.T / settings.temperature
    of_document, of_place, of_language, of_group = key_facts
    same = documents[:, None] == of_document
    own = same & (places[:, None] == of_place)
    inside = same & ~own
    # The same document may be there twice (`data.pairs_per_group`): what equals the right answer is no wrong one.
    outside = (languages[:, None] == of_language) & (groups[:, None] != of_group)
    means = [(scores.detach() * part).sum(1) / part.sum(1).clamp_min(1) for part in (inside, outside)]
    # Without a negative outside there is no level to pull to.
    bias = settings.bias * torch.where(outside.any(1), means[0] - means[1], 0.0)
    right = (scores * own).sum(1)
    unbiased = scores.masked_fill(~(own | inside | outside), float("-inf"))
    biased = torch.where(inside, unbiased - bias[:, None], unbiased)
    hits = unbiased.masked_fill(own, float("-inf")).amax(1) < right
    return biased.logsumexp(1) - right, unbiased.logsumexp(1).detach() - right.detach(), hits.float()
