"""Gradients of a batch that is encoded in chunks, exactly those of the whole batch (GradCache, Gao et al. 2021,
arXiv 2101.06983, for a hierarchy).

Document vectors are computed chunk by chunk without a graph; the loss runs once on all of them; then every chunk is
encoded again, with the same dropout, and the gradient of its vectors is pushed back through it. Memory for activations
is that of one chunk, whatever the batch, for one forward pass more. The cut is at the document vectors: the upper encoder
is a few per cent of the work, so encoding it twice costs less than keeping its graph over the whole batch.

DeepSpeed is told to reduce gradients once a step. Called once for each chunk it would, under ZeRO 1 and 2, silently
keep the last chunk's gradient alone.
"""

import contextlib
from collections.abc import Callable

import torch

from hmde_dist.objectives.tile_loss import Contrast
from hmde_dist.stream.loader import RankBatch


def forward_backward(
    engine,
    batch: RankBatch,
    objective: Callable[..., Contrast],
    seed: Callable[[int], int],
) -> tuple[Contrast, torch.Tensor]:
    """Encode a batch, compute its loss and leave its reduced gradients in the engine; returns the loss and the scale.

    A collective: all ranks have the same number of chunks.

    Args:
        objective: `objective(documents, scale=scale)`, of document vectors [D, W] in the order of the batch.
        seed: of the random state of chunk number i; it is set before each time the chunk is encoded.
    """
    if len(batch.chunks) == 1:
        torch.manual_seed(seed(0))
        documents, scale = engine(batch.chunks[0])
        contrast = objective(documents, scale=scale)
        engine.backward(contrast.loss)
        return contrast, scale.detach()

    with torch.no_grad():
        vectors = []
        for number, chunk in enumerate(batch.chunks):
            torch.manual_seed(seed(number))
            found, scale = engine(chunk)
            vectors.append(found)
    documents = torch.empty(len(batch.groups), vectors[0].shape[1], device=vectors[0].device)
    for place, found in zip(batch.places, vectors, strict=True):
        documents[place] = found.float()
    documents.requires_grad_()
    scale = scale.detach().requires_grad_()
    contrast = objective(documents, scale=scale)
    # Outside the engine: these are leaves, nothing of the model.
    contrast.loss.backward()

    last = len(batch.chunks) - 1
    with _one_reduction(engine) as alone:
        for number, (chunk, place) in enumerate(zip(batch.chunks, batch.places, strict=True)):
            torch.manual_seed(seed(number))
            with alone() if number < last else contextlib.nullcontext():
                found, again = engine(chunk)
                surrogate = (found.float() * documents.grad[place]).sum()
                if number == last and scale.grad is not None:
                    # In one chunk only, or it would count once for each.
                    surrogate = surrogate + (again * scale.grad).sum()
                engine.backward(surrogate)
    return contrast, scale.detach()


@contextlib.contextmanager
def _one_reduction(engine):
    """Reduce gradients once for all backward passes inside; gives the context of each pass but the last."""
    if engine.zero_optimization_stage() == 0:
        yield engine.no_sync
    else:
        with engine.coalesce_grad_reduction():
            yield contextlib.nullcontext
