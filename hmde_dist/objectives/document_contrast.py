"""The HMDE objective: symmetric cross-lingual contrast of documents (arXiv 2305.07016, reference code `ContrastiveModel`).

For pairs (x_i, y_i) of comparable documents, s = scale * cosine:
    loss = mean_i CE(s(x_i, y_1..N), i) + mean_i CE(s(y_i, x_1..N), i)
a sum of the two directions, as in the reference. Here the N candidates come from every rank, category neighbours in the
batch are the hard negatives, and other versions of the anchor's own group never count as negatives.

With explicit hard negatives (`data.hard_negatives: paper`) two more parts follow the pairs, a negative for each first and for
each second document, in the language of its side: h and g of the reference. They join the candidates y of x_i, and the
candidates x of y_i.

With `same_side` the other documents of its own side are candidates, too, x_j of x_i and y_j of y_i (as in GTE, Li et al. 2023,
arXiv 2308.03281; there all terms of a pair share one sum): a document that is merely in the right language is no answer.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.gather import Ranks, gather
from hmde_dist.objectives.objective import Loss, Rows, by_number
from hmde_dist.objectives.tile_loss import Hard, tile_loss
from hmde_dist.recipe import Count, ObjectiveSection
from hmde_dist.stream.batch import PackedBatch


class Settings(ObjectiveSection):
    scale: Annotated[float, Field(gt=0)] = Field(20.0, description="of the cosine (1 / temperature)")
    trainable_scale: bool = Field(False, description="learn the scale, starting from `scale`")
    positives: Literal["own", "group"] = Field(
        "own",
        description="group = all versions of a document in the batch are right answers, as in LAPCA; own = its partner",
    )
    same_side: bool = Field(False, description="other documents of the anchor's own side are negatives, too")
    margin: Annotated[float, Field(ge=0)] | None = Field(
        None, description="a wrong answer with a cosine this far above the right one's does not count; none = all count"
    )
    widths: list[Count] | None = Field(
        None, description="also on the first so many components (Matryoshka); none = whole"
    )
    spread: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the mean squared cosine of different documents of a side (spread-out regulariser)"
    )


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        # Shape [1]: DeepSpeed cannot broadcast parameters without a dimension.
        self.log_scale_change = nn.Parameter(torch.zeros(1)) if settings.trainable_scale else None

    def constants(self) -> Rows:
        if self.log_scale_change is None:
            return {}
        return {"scale": self.settings.scale * self.log_scale_change.exp()}

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        facts = {name: torch.from_numpy(getattr(batch.facts, name)) for name in ("numbers", "groups")}
        sides = torch.full((len(batch.facts.numbers),), batch.facts.sides)
        facts |= {"sides": sides}
        return {"documents": output.documents} | {
            name: fact.to(output.documents.device) for name, fact in facts.items()
        }

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        settings = self.settings
        documents, groups = (by_number(rows[name], rows["numbers"]) for name in ("documents", "groups"))
        scale = constants.get("scale", documents.new_tensor([settings.scale]))
        (x, y, *hard), (pair_groups, _, *hard_groups) = (
            part.chunk(int(rows["sides"][0])) for part in (documents, groups)
        )
        if settings.same_side:
            # Of its own group a row sees no such column: neither itself nor another version.
            hard = [torch.cat([*hard[:1], x]), torch.cat([*hard[1:], y])]
            hard_groups = [torch.cat([*hard_groups[:1], pair_groups]), torch.cat([*hard_groups[1:], pair_groups])]
        hard_x, hard_y = map(Hard, hard, hard_groups) if hard else (None, None)
        widths = [(width, 1 / len(settings.widths)) for width in settings.widths] if settings.widths else None
        contrast = tile_loss(
            x, y, pair_groups, scale, hard_x=hard_x, hard_y=hard_y, positives=settings.positives, margin=settings.margin,
            widths=widths, ranks=ranks,
        )  # fmt: skip
        loss, watched = contrast.loss, {"scale": scale.detach().mean()}
        if settings.spread:
            watched["spread"] = spread_out(x, ranks) + spread_out(y, ranks)
            loss = loss + settings.spread * watched["spread"]
        return Loss(loss, contrast.accuracy, contrast.negatives - settings.same_side, watched)


def spread_out(vectors: Tensor, ranks: Ranks) -> Tensor:
    """Mean squared cosine of different vectors [n, W] of all ranks (Zhang et al. 2017, arXiv 1708.06320, second moment).

    From the sum of outer products, for sum_ij (x_i . x_j)^2 = |sum_i x_i x_i^T|^2: nothing of size n * n is held.
    """
    units = F.normalize(vectors.float(), dim=-1)
    moments = units.T @ units
    if ranks.size > 1:
        moments = gather(moments[None]).sum(0)
    number = len(units) * ranks.size
    return (moments.square().sum() - number) / max(1, number * (number - 1))
