"""What do the tiles of the contrastive loss cost? Seconds and memory of forward and backward, beside the dense loss.

One process stands for rank 0 of --ranks: what the others would send is a copy of its own vectors, and no time goes to
collectives. Memory is the peak beyond what the process had before the call, without the gathered vectors and their
gradients, which either loss needs. Each row is measured once, in a process of its own.
"""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from hmde_dist.benchmark import peak_bytes
from hmde_dist.command import FAILED, InputError, argument_parser, positive, run_command
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.tile_loss import TILE, tile_loss

DENSE_COPIES = 5  # matrices of scores alive at the peak of the dense loss, rounded up: it is not started without room


class FirstOf(Ranks):
    """Rank 0 of `size`, alone."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size

    def all_gather(self, local: torch.Tensor) -> torch.Tensor:
        return local.repeat(self.size, *[1] * (local.ndim - 1))

    def maximum(self, tensor: torch.Tensor) -> None:
        pass

    def total(self, tensor: torch.Tensor) -> None:
        pass

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: len(tensor) // self.size]


def main() -> int | None:
    parser = argument_parser(__doc__, "python tools/bench_loss.py --pairs 1024 8192 --ranks 8")
    parser.add_argument("--pairs", type=positive, nargs="+", default=[1024, 8192], help="of a rank (%(default)s)")
    parser.add_argument("--ranks", type=positive, default=8, help="that the process stands for (%(default)s)")
    parser.add_argument("--width", type=positive, default=768, help="of a vector (%(default)s)")
    parser.add_argument("--tile", type=positive, default=TILE, help="rows and columns of a tile (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    parser.add_argument("--loss", choices=("tiles", "dense"), help="measure one, here, and print seconds and MiB only")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU")
    if args.loss:
        for pairs in args.pairs:
            print(*(f"{value:.1f}" for value in measure(args, pairs)))
        return None
    print(f"{'pairs':>6} {'columns':>8} {'scores MiB':>10}  {'loss':5} {'seconds':>8} {'MiB':>8}")
    for pairs in args.pairs:
        columns = pairs * args.ranks
        matrix = pairs * columns * 4
        for loss in ("tiles", "dense"):
            row = f"{pairs:>6} {columns:>8} {matrix / 2**20:>10.0f}  {loss:5}"
            if loss == "dense" and DENSE_COPIES * matrix > free_bytes(args.device):
                print(row, "   does not fit")
                continue
            options = [f"--{name}={getattr(args, name)}" for name in ("ranks", "width", "tile", "device")]
            command = [sys.executable, Path(__file__), f"--loss={loss}", f"--pairs={pairs}", *options]
            job = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if job.returncode:
                return FAILED
            seconds, mebibytes = job.stdout.split()
            print(row, f"{seconds:>8} {mebibytes:>8}", flush=True)
    return None


def measure(args, pairs: int) -> tuple[float, float]:
    """Seconds and MiB of one call after a tiny one, which loads what the libraries load late."""
    loss = tiles if args.loss == "tiles" else dense
    call(loss, 8, 1, args)
    torch.manual_seed(0)
    x, y = torch.randn(2, pairs, args.width, device=args.device).unbind()
    return call(loss, pairs, args.ranks, args, x, y)


def call(loss, pairs: int, ranks: int, args, x=None, y=None) -> tuple[float, float]:
    if x is None:
        x, y = torch.randn(2, pairs, args.width, device=args.device).unbind()
    x.requires_grad_()
    y.requires_grad_()
    scale = torch.tensor([20.0], device=args.device, requires_grad=True)
    groups = torch.arange(pairs, device=args.device)
    before = peak_bytes(args.device, reset=True)
    start = time.perf_counter()
    loss(x, y, groups, scale, ranks, args.tile).backward()
    peak = peak_bytes(args.device)
    seconds = time.perf_counter() - start
    sides = 1 if loss is tiles else 2
    return seconds, (peak - before - sides * 2 * ranks * x.numel() * 4) / 2**20


def tiles(x, y, groups, scale, ranks: int, tile: int) -> torch.Tensor:
    return tile_loss(x, y, groups, scale, tile=tile, ranks=FirstOf(ranks)).loss


def dense(x, y, groups, scale, ranks: int, tile: int) -> torch.Tensor:
    """The same with this rank's rows against all columns as one matrix a direction."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    own = torch.arange(len(x), device=x.device)
    masked = groups[:, None] == groups.repeat(ranks)
    masked[own, own] = False
    loss = 0
    for rows, columns in ((x, y), (y, x)):
        scores = (scale * rows @ columns.repeat(ranks, 1).T).masked_fill(masked, float("-inf"))
        loss = loss + F.cross_entropy(scores, own)
    return loss


def free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


if __name__ == "__main__":
    run_command(main)
