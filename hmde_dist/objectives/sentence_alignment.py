"""Sentence alignment (ALIGN of Mao et al. 2021, arXiv 2105.13856): a sentence's vector must find that of its translation.

For aligned sentences (x_i, y_i) of the two documents of every pair, s_ij = x_i . y_j:
    loss = mean_i CE(s_i., i) + mean_i CE(s_.i, i)
a sum of the two directions, as in the paper's code. There a batch is one of sentence pairs; here the N aligned sentences of all
ranks are one, and versions of the anchor's own sentence do not count as negatives. `temperature` gives the form of its successor
(EMS, Mao et al. 2022, arXiv 2205.15744), without its projection: s = cosine / temperature.

Which sentences are aligned says `aligned.py`.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.aligned import aligned_rows, scored
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, gather_ragged, sums_over_rows, total_count
from hmde_dist.recipe import ObjectiveSection
from hmde_dist.stream.batch import PackedBatch


class Settings(ObjectiveSection):
    needs_sentences: ClassVar[bool] = True
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of cosines (EMS: 0.1); none = raw dot products, as in the paper"
    )


class Objective(objective.Objective):
    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        return aligned_rows(batch, output.sentences)

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        x, y = (scored(rows[name], self.settings.temperature) for name in ("x", "y"))
        facts = [rows["group"], rows["place"]]
        # A padded column has place -1, which no sentence has.
        columns = [gather_ragged(fact, ranks, -1) for fact in facts]
        own = torch.arange(len(x), device=x.device) + ranks.rank * (len(columns[0]) // ranks.size)
        losses, right = x.new_zeros(()), x.new_zeros(())
        for anchors, partners in ((x, y), (y, x)):
            keys = gather_ragged(partners, ranks, 0.0)
            more, hits = sums_over_rows(alignment_losses, [anchors, own, *facts], keys, columns)
            losses, right = losses + more, right + hits / 2
        aligned = total_count(len(x), ranks, x.device)
        count = max(1.0, aligned) / ranks.size
        watched = {"aligned": x.new_tensor(aligned)}
        return Loss(losses / count, (right / count).detach(), max(0, int(aligned) - 1), watched)


def alignment_losses(
    anchors: Tensor, own: Tensor, groups: Tensor, places: Tensor, keys: Tensor, key_facts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each anchor [m, W] over the keys [N, W], and whether its own key scores highest.

    Args:
        own: [m] which key is the anchor's.
        groups, places: of each anchor; key_facts: of each key; place -1 is no key.
    """
    scores = anchors @ keys.T
    right = scores.gather(1, own[:, None])
    of_group, of_place = key_facts
    is_own = own[:, None] == torch.arange(len(keys), device=keys.device)
    same_sentence = (groups[:, None] == of_group) & (places[:, None] == of_place)
    scores = scores.masked_fill((same_sentence | (of_place < 0)) & ~is_own, float("-inf"))
    hits = ~((scores >= right) & ~is_own).any(1)
    return scores.logsumexp(1) - right[:, 0], hits.to(scores.dtype)
