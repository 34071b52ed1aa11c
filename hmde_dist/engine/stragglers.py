"""Stragglers: what each rank's own work takes, so that a slow node has a name.

The time of a whole step is the same on all ranks, for they wait for one another. What differs is measured here: the forward
passes of the model, and waiting for batches.
"""

import statistics
import time

import torch

from hmde_dist.topology import World

LISTED = 8  # slowest ranks in the table


class Stragglers:
    """Sums over the steps since the last reading, of the forward passes of `module`."""

    def __init__(self, module: torch.nn.Module, world: World):
        self.world = world
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._forward = self._waited = 0.0
        self._steps = 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module, inputs) -> None:
        if not module.training:
            return
        if self.world.device.type == "cuda":
            # Kernels run later than they are called: the GPU itself notes the time.
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        else:
            self._began = time.perf_counter()

    def _after(self, module, inputs, outputs) -> None:
        if not module.training:
            return
        if self.world.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._forward += time.perf_counter() - self._began

    def count(self, waited: float) -> None:
        """A step is over, which waited so many seconds for its batch."""
        self._steps += 1
        self._waited += waited

    def read(self) -> dict:
        """The table of the slowest ranks since the last reading, in seconds a step. A collective, of two numbers a rank.

        Returns:
            "forward_seconds" and "wait_seconds", medians over ranks; "slowest_over_median", of the forward passes; and
            "slowest", [rank, forward seconds, wait seconds] of the slowest ranks.
        """
        for first, last in self._events:
            last.synchronize()
            self._forward += first.elapsed_time(last) / 1000
        steps = max(1, self._steps)
        rows = self.world.gather((self._forward / steps, self._waited / steps))
        self._forward = self._waited = 0.0
        self._steps, self._events = 0, []
        return table(rows)


def table(rows: list[tuple[float, float]]) -> dict:
    """See `Stragglers.read`; `rows` are (forward seconds, wait seconds) of every rank."""
    forward, wait = (statistics.median(column) for column in zip(*rows, strict=True))
    order = sorted(range(len(rows)), key=lambda rank: -sum(rows[rank]))
    return {
        "forward_seconds": forward,
        "wait_seconds": wait,
        "slowest_over_median": max(row[0] for row in rows) / max(forward, 1e-9),
        "slowest": [[rank, *(round(value, 5) for value in rows[rank])] for rank in order[:LISTED]],
    }
