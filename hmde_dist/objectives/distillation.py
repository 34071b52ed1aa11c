"""Distillation: a document's vector, projected, points where a teacher's vector of the same document does.

For document vectors z and the teacher's t of the documents that it has vectors of,
    loss = 1/n sum_i 1 - cos(W z_i + b, t_i),   n such documents of all ranks
(the embedding distillation of jina-embeddings-v5, Akram et al. 2026, arXiv 2602.15547). The projection is trained, and left behind with
the other weights of objectives when the model is exported. The teacher is a folder of vectors, `data.teacher`, encoded once: it costs no
memory and no pass here, and may have another tokenizer, width and length. How much of a batch it has no vectors of is watched as `missing`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, gather_ragged, sums_over_rows, total_count
from hmde_dist.recipe import Count, ObjectiveSection
from hmde_dist.stream.batch import PackedBatch


class Settings(ObjectiveSection):
    needs_teacher: ClassVar[bool] = True
    width: Count = Field(description="components of the teacher's vectors")


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        self.project = nn.Linear(encoder.config.hidden_size, settings.width)

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        teacher = torch.from_numpy(batch.facts.teacher).to(output.documents.device)
        return {"student": self.project(output.documents), "teacher": teacher}

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        teacher = rows["teacher"].detach()
        known = ~teacher.isnan().any(dim=1)
        student, teacher = (F.normalize(vectors[known], dim=1) for vectors in (rows["student"], teacher))
        teacher = teacher.to(student.dtype)
        everyone = gather_ragged(teacher, ranks, float("nan"))
        own = torch.arange(len(student), device=student.device) + ranks.rank * (len(everyone) // ranks.size)
        losses, right = sums_over_rows(distillation_losses, [student, teacher, own], everyone)
        total = total_count(len(own), ranks, student.device)
        count = max(1.0, total) / ranks.size
        watched = {"missing": 1 - known.double().mean()}
        return Loss(losses / count, (right / count).detach(), max(0, int(total) - 1), watched)


def distillation_losses(student: Tensor, teacher: Tensor, own: Tensor, everyone: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit rows [m, W] the loss, and whether no row of `everyone` [n, W] is nearer than the teacher's at place `own` [m].

    Rows of NaN, which pad it, are never nearer.
    """
    cosines = student.detach() @ everyone.T
    nearer = (cosines > cosines.gather(1, own[:, None])).any(dim=1)
    return 1 - (student * teacher).sum(dim=1), (~nearer).to(student.dtype)
