"""Sentence similarity (SIM of Mao et al. 2021, arXiv 2105.13856): sentences are as alike in one language as their translations are
in the other.

For aligned sentences x_i and y_i of the two documents of every pair, P = softmax(x x^T) and Q = softmax(y y^T), row by row:
    loss = 1/N sum_ij -log cos(pi/2 (P_ij - Q_ij)),   N aligned sentences of all ranks, the columns of every row
The paper's code takes the sum over a batch of fixed size. Here N changes with the documents of a step, and a sum would weigh steps
by it: as probabilities of a row add up to 1, so does what a row can cost, and rows are averaged like those of every other loss.
The paper's weight 2 at batches of 128 is a weight of 256 here. `temperature` compares cosines over it.

By itself it is least where all vectors are the same: it goes with `sentence_alignment`. Which sentences are aligned says `aligned.py`.
"""

from math import pi
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

LARGEST = 1 - 1e-4  # difference of two probabilities; at 1 the loss would be infinite


class Settings(ObjectiveSection):
    needs_sentences: ClassVar[bool] = True
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of cosines; none = raw dot products, as in the paper"
    )


class Objective(objective.Objective):
    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        return aligned_rows(batch, output.sentences)

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        sides = [scored(rows[name], self.settings.temperature) for name in ("x", "y")]
        columns = [gather_ragged(side, ranks, 0.0) for side in sides]
        padding = gather_ragged(rows["place"], ranks, -1) < 0
        own = torch.arange(len(sides[0]), device=padding.device) + ranks.rank * (len(padding) // ranks.size)
        losses, right = sums_over_rows(similarity_losses, [*sides, own], *columns, padding)
        aligned = total_count(len(own), ranks, padding.device)
        count = max(1.0, aligned) / ranks.size
        watched = {"aligned": losses.new_tensor(aligned)}
        return Loss(losses / count, (right / count).detach(), max(0, int(aligned) - 1), watched)


def similarity_losses(
    x: Tensor, y: Tensor, own: Tensor, all_x: Tensor, all_y: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of each sentence [m], summed over the columns [N], and whether its nearest other one is the same in both languages.

    Args:
        x, y: [m, W]; all_x, all_y: [N, W], among them x and y at the places `own` [m].
        padding: [N] which columns are none.
    """
    scores = [(rows @ columns.T).masked_fill(padding, float("-inf")) for rows, columns in ((x, all_x), (y, all_y))]
    p, q = (side.softmax(1) for side in scores)
    losses = -torch.cos((p - q).clamp(-LARGEST, LARGEST) * (pi / 2)).log()
    others = [side.scatter(1, own[:, None], float("-inf")).topk(min(1, len(padding)), dim=1).indices for side in scores]
    return losses.sum(1), (others[0] == others[1]).all(1).to(losses.dtype)
