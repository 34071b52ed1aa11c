"""The ranks of a loss: their collectives, and gathering vectors from every rank with their exact gradient. The one place where the
scaling convention is stated.

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


class Ranks:
    """The collectives of the loss among the default process group; without one, or `alone`, there are none."""

    def __init__(self, alone: bool = False):
        joined = dist.is_initialized() and not alone
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def all_gather(self, local: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks, in the order of the ranks: [c, ...] -> [size * c, ...]."""
        if self.size == 1:
            return local
        gathered = local.new_empty(self.size * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    def maximum(self, tensor: torch.Tensor) -> None:
        """In place, the largest of the ranks' values."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def total(self, tensor: torch.Tensor) -> None:
        """In place, the sum of the ranks' values."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum over ranks: [size * c, ...] -> [c, ...]."""
        if self.size == 1:
            return tensor
        own = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        dist.reduce_scatter_tensor(own, tensor)
        return own
