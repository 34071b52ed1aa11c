"""Sentences in context (InSeNT, Conti et al. 2025, arXiv 2505.24782): a sentence must be found by its contextual vector, among those
of its own document and among those of others.

The keys k are the sentences' states behind the document encoder; the query q_i is the vector of sentence i before it, or with
`queries: aligned` that of its translation in the other document of the pair. With s_ij = scale * cosine(q_i, k_j):
    L_document = CE(s_ii; all s_ij with j in i's document),   L_batch = CE(s_ii; s_ii and all s_ij with j in other groups)
    loss = mean over documents of the mean over their queries of  share * L_document + (1 - share) * L_batch
As in the paper's code the two losses have no negative in common. There queries are questions; what stands in their place here needs
no labels. The candidates come from all ranks; other versions of the document are in neither loss.

Legend: M queries of this rank, S sentences of this rank, N of all ranks.
"""

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.aligned import aligned_sentences
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import (
    Loss,
    Rows,
    documents_of_sentences,
    gather_ragged,
    sums_over_rows,
    total_count,
    whole_count,
)
from hmde_dist.recipe import ObjectiveSection
from hmde_dist.stream.batch import PackedBatch


class Settings(ObjectiveSection):
    needs_layers: ClassVar[bool] = True
    queries: Literal["own", "aligned"] = Field(
        "own", description="own = every sentence finds itself in context; aligned = its translation does"
    )
    share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the loss among the document's own sentences"
    )
    scale: Annotated[float, Field(gt=0)] = Field(20.0, description="of the cosine (1 / temperature)")

    @property
    def needs_sentences(self) -> bool:
        return self.queries == "aligned"


class Objective(objective.Objective):
    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        owner, counts = documents_of_sentences(batch).numpy(), np.array(batch.sentence_counts, dtype=np.int64)
        # Numbers of documents are those of the rank, so that they mean the same in every chunk; places are inside them.
        keys = {
            "document": batch.facts.numbers[owner],
            "place": np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner],
            "group": batch.facts.groups[owner],
        }
        asking = finding = np.arange(len(owner))
        if self.settings.queries == "aligned":
            aligned = aligned_sentences(batch)
            asking, finding = np.concatenate([[aligned.first, aligned.second], [aligned.second, aligned.first]], axis=1)
        queries = {name: fact[finding] for name, fact in keys.items()}
        queries["siblings"] = np.bincount(owner[finding], minlength=len(counts))[owner[finding]]
        facts = {f"key_{name}": fact for name, fact in keys.items()}
        facts |= {f"query_{name}": fact for name, fact in queries.items()}
        device = output.sentences.device
        return {"queries": output.sentences[torch.from_numpy(asking).to(device)], "keys": output.contextual} | {
            name: torch.from_numpy(fact).to(device) for name, fact in facts.items()
        }

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        settings = self.settings
        rows = rows | {name: F.normalize(rows[name], dim=-1) for name in ("queries", "keys")}
        for name in ("query_document", "key_document"):
            rows[name] = rows[name] + ranks.rank * (1 << 32)  # documents of different ranks are different
        names = ("document", "place", "group")
        keys = gather_ragged(rows["keys"], ranks, 0.0)
        key_facts = [gather_ragged(rows[f"key_{name}"], ranks, -1) for name in names]
        queries = [rows["queries"], *(rows[f"query_{name}"] for name in (*names, "siblings"))]
        inside, outside, right = sums_over_rows(contextual_losses, queries, keys, key_facts, settings.scale)
        documents = whole_count(round(float((1 / rows["query_siblings"]).sum())), ranks, keys.device)
        inside, outside, right = (total / documents for total in (inside, outside, right))
        watched = {"in_document": inside.detach(), "in_batch": outside.detach()}
        if settings.queries == "aligned":
            watched["aligned"] = keys.new_tensor(total_count(len(rows["queries"]), ranks, keys.device) / 2)
        loss = settings.share * inside + (1 - settings.share) * outside
        return Loss(loss, right.detach(), len(keys) - 1, watched)


def contextual_losses(
    queries: Tensor,
    documents: Tensor,
    places: Tensor,
    groups: Tensor,
    siblings: Tensor,
    keys: Tensor,
    key_facts: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_document, L_batch and whether the own key scores above all others, of each query [m], divided by its `siblings`.

    Args:
        queries: [m, W]; keys: [N, W], unit vectors, exactly one of them the query's own.
        documents, places, groups: of each query's own key; key_facts: the same of each key, place -1 is no key.
        siblings: queries that find a sentence of the same document.
    """
    of_document, of_place, of_group = key_facts
    scores = scale * queries @ keys.T
    same = documents[:, None] == of_document
    own = same & (places[:, None] == of_place)
    others = (groups[:, None] != of_group) & (of_place >= 0)
    right = (scores * own).sum(1)
    losses = [scores.masked_fill(~part, float("-inf")).logsumexp(1) - right for part in (same, own | others)]
    hits = ~((scores >= right[:, None]) & (same | others) & ~own).any(1)
    return losses[0] / siblings, losses[1] / siblings, hits / siblings
