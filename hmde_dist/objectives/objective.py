"""What every objective is: rows out of each chunk, and one loss over the rows of all chunks and ranks.

An objective is a file of this folder with a `Settings` (its section of a recipe) and an `Objective`. The gradient cache runs
`rows` inside the engine, chunk by chunk, and `loss` once outside, on the rows of all chunks of this rank; whatever crosses
chunks or ranks belongs in `loss`. Convention of every loss: the mean over ranks of what the ranks return is the loss of the
global batch (see `gather.py`).
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives.gather import Ranks, gather
from hmde_dist.recipe import ObjectiveSection, Recipe
from hmde_dist.stream.batch import PackedBatch

Rows = dict[str, Tensor]
BLOCK = 1024  # rows of a matrix of scores at a time


class Loss(NamedTuple):
    """The loss of this rank, and what is worth watching about it."""

    loss: Tensor  # []
    accuracy: Tensor  # [] share of rows that are right: their own partner scores highest, their token is the likeliest
    negatives: int  # wrong answers that a row is compared with
    watched: dict[str, Tensor]  # further numbers for the journal, means over this rank's rows
    commit: Callable[[], None] | None = None  # if the step is applied: takes it over into the objective's buffers


class Objective(nn.Module):
    """One published method. Parameters in here are trained with the encoder's."""

    def __init__(self, settings: ObjectiveSection, encoder: HMDEModel):
        super().__init__()
        self.settings = settings

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        """What the loss needs of a chunk: tensors whose first dimension may differ between chunks. Integers are facts."""
        raise NotImplementedError

    def constants(self) -> Rows:
        """Trained parameters that the loss reads by themselves; under ZeRO-3 they exist only inside the engine."""
        return {}

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        """The loss over this rank's rows, which lie chunk after chunk. A collective."""
        raise NotImplementedError


def build_objectives(recipe: Recipe, encoder: HMDEModel) -> nn.ModuleList:
    """The objectives of a recipe, in its order; their fresh weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        return nn.ModuleList(
            importlib.import_module(f"hmde_dist.objectives.{one.name}").Objective(one, encoder)
            for one in recipe.objectives
        )


def by_number(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows of documents in the order of the rank batch, whichever chunks they came from."""
    return rows[torch.argsort(numbers)]


def documents_of_sentences(batch: PackedBatch) -> Tensor:
    """int64 [S] for every sentence, in document order, the place of its document in the chunk; on the CPU."""
    counts = torch.tensor(batch.sentence_counts)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def total_count(count: float, ranks: Ranks, device: torch.device) -> float:
    """The sum over ranks. A collective."""
    total = torch.tensor([float(count)], dtype=torch.float64, device=device)
    ranks.total(total)
    return float(total)


def whole_count(count: float, ranks: Ranks, device: torch.device) -> float:
    """The mean over ranks of their number of rows, by which each divides the sum of its rows' losses. A collective."""
    return max(1.0, total_count(count, ranks, device)) / ranks.size


def gather_ragged(local: Tensor, ranks: Ranks, fill: float) -> Tensor:
    """Rows of all ranks with their gradient, in the order of the ranks, padded with `fill` to equal numbers. A collective."""
    if ranks.size == 1:
        return local
    longest = torch.tensor([len(local)], device=local.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padding = local.new_full((int(longest) - len(local), *local.shape[1:]), fill)
    return gather(torch.cat([local, padding]))


def sums_over_rows(losses: Callable[..., Sequence[Tensor]], rows: Sequence[Tensor], *others) -> list[Tensor]:
    """The sums of each of what `losses(*rows, *others)` finds for every row, computed for a block of rows at a time.

    Scores are made again in the backward pass: a matrix [BLOCK, N] is all that is held. Without any row `losses` is called
    with none: a rank that has nothing to say takes part in the backward pass of the gathers all the same.
    """
    blocks = []
    for start in range(0, max(1, len(rows[0])), BLOCK):
        part = [row[start : start + BLOCK] for row in rows]
        found = checkpoint(losses, *part, *others, use_reentrant=False)
        blocks.append(torch.stack([one.sum() for one in found]))
    return list(torch.stack(blocks).sum(0))
