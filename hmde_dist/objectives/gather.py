"""Gathering vectors from every rank with their exact gradient: the one place where the scaling convention is stated.

Convention: each rank's loss is the mean over its own rows; the engine averages gradients over ranks. The gradient of a
gathered vector is the sum over ranks of what each rank's loss says about it. Together this is, factor for factor, the
gradient of the mean over all rows of the global batch, for the encoder and for a trainable scale alike.
"""

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        parts = [part.contiguous() for part in gradient.chunk(dist.get_world_size())]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def gather(local: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, in the order of the ranks: [n, ...] -> [W * n, ...]; n is the same on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return _Gather.apply(local)
