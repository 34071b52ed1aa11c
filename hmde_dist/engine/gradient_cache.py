"""Gradients of a batch that is encoded in chunks, exactly those of the whole batch (GradCache, Gao et al. 2021,
arXiv 2101.06983, for a hierarchy).

The rows that the losses need (document vectors, queries, sums over tokens, ...) are computed chunk by chunk without a graph; the
losses run once on all of them; then the gradient of its rows is pushed back through every chunk, which is encoded again for that
with the same dropout. (Not the last one, which still has its graph.) Memory for activations is that of one chunk, whatever the
batch, for one forward pass more. The cut is behind the document encoder: that is a few per cent of the work, so encoding it
twice costs less than keeping its graph over the whole batch.

DeepSpeed is told to reduce gradients once a step. Called once for each chunk it would, under ZeRO 1 and 2, silently
keep the last chunk's gradient alone.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from hmde_dist.stream.loader import RankBatch


def forward_backward(
    engine,
    batch: RankBatch,
    total_loss: Callable[[dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, list]],
    seed: Callable[[int], int],
) -> tuple[Tensor, list]:
    """Encode a batch, compute its loss and leave its reduced gradients in the engine; returns what `total_loss` does.

    A collective: all ranks have the same number of chunks.

    Args:
        total_loss: `total_loss(rows, constants)` = (loss, parts), see `TrainedModule`.
        seed: of the random state of chunk number i; it is set before each time the chunk is encoded.
    """
    if len(batch.chunks) == 1:
        torch.manual_seed(seed(0))
        loss, parts = total_loss(*engine(batch.chunks[0]))
        engine.backward(loss)
        return loss.detach(), parts

    last = len(batch.chunks) - 1
    found = []
    for number, chunk in enumerate(batch.chunks):
        torch.manual_seed(seed(number))
        # The last one keeps its graph, for its turn comes next: one chunk less is encoded twice.
        with torch.set_grad_enabled(number == last):
            rows, constants = engine(chunk)
        found.append(rows)
    leaves = {name: _leaf(torch.cat([rows[name].detach() for rows in found])) for name in rows}
    constant_leaves = {name: _leaf(tensor) for name, tensor in constants.items()}
    loss, parts = total_loss(leaves, constant_leaves)
    # Outside the engine: these are leaves, nothing of the model.
    loss.backward()

    lengths = {name: [len(one[name]) for one in found] for name in leaves}
    gradients = {name: leaf.grad.split(lengths[name]) for name, leaf in leaves.items() if leaf.grad is not None}
    del found
    with _one_reduction(engine) as alone:
        for number in (last, *range(last)):
            with alone() if number != last - 1 else contextlib.nullcontext():
                if number != last:
                    torch.manual_seed(seed(number))
                    rows, _ = engine(batch.chunks[number])
                surrogate = sum((rows[name].float() * found[number]).sum() for name, found in gradients.items())
                if number == last:
                    # In one chunk only, or they would count once for each.
                    for name, leaf in constant_leaves.items():
                        if leaf.grad is not None:
                            surrogate = surrogate + (constants[name] * leaf.grad).sum()
                engine.backward(surrogate)
                del rows, surrogate
    return loss.detach(), parts


def _leaf(tensor: Tensor) -> Tensor:
    """A tensor that collects its gradient, if it is one of numbers that have one."""
    return tensor.detach().float().requires_grad_() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _one_reduction(engine):
    """Reduce gradients once for all backward passes inside; gives the context of each pass but the last."""
    if engine.zero_optimization_stage() == 0:
        yield engine.no_sync
    else:
        with engine.coalesce_grad_reduction():
            yield contextlib.nullcontext
