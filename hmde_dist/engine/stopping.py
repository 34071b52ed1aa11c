"""Stopping on request: signals, a time limit, and a file, agreed on by all ranks at a step boundary.

A request only sets a flag; the loop asks `requested` at the end of each step and inside validation, saves, and ends with exit
code 75. What was asked of one rank all ranks then know.
"""

import signal
import time

from hmde_dist.recipe import RunSection
from hmde_dist.topology import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FILE = "STOP"


class Stopping:
    """Takes over SIGTERM, SIGUSR1 and SIGUSR2; the time limit counts from here.

    Attributes:
        reason: why the run stops, once `requested` has said that it does.
    """

    def __init__(self, run: RunSection, world: World):
        self.world, self.file, self.reason = world, run.folder / FILE, ""
        minutes = run.time_limit_minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self._signal = ""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _) -> None:
        self._signal = signal.Signals(number).name

    def requested(self) -> bool:
        """Whether any rank was asked to stop; the same on all ranks. A collective, until it is true."""
        if not self.reason and self.world.agree(bool(self._own_reason())):
            self.reason = self.world.messages(self._own_reason())[0]
            if self.world.is_first:
                # It has been heard; the next start is another matter.
                self.file.unlink(missing_ok=True)
        return bool(self.reason)

    def _own_reason(self) -> str:
        if self._signal:
            return self._signal
        if time.monotonic() >= self._deadline:
            return "run.time_limit_minutes"
        return FILE if self.world.is_first and self.file.exists() else ""
