"""The hang watch: when a run makes no step any more, says which rank stands where, and ends it.

A thread of each rank sees when its own main thread has not beaten for `run.hang_minutes`. It then writes the tracebacks of all
threads to RUN/hang/rank-00001.txt and where the main thread stands beside it. A rank that waits inside a collective waits for
others; the others are to blame. The lowest rank that is alive names them in one line on stderr, and all end with exit code 1.

A rank that cannot even run this thread (a C extension that holds the interpreter's lock) is ended by faulthandler, which writes
its traceback to stderr a little later; one that is frozen altogether is named as missing by the others, and ended by the launcher.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

from hmde_dist.command import FAILED, output_file
from hmde_dist.topology import World

GRACE = 5.0  # seconds in which all ranks find out, after the first has

# Innermost frames of a rank that waits for others.
_WAITING = ("torch/distributed/", "deepspeed/comm/")
# Frames of libraries, which say little about who called them.
_LIBRARIES = ("/torch/", "/deepspeed/")


class HangWatch:
    """Watches from `start` until `stop`.

    Args:
        folder: for the reports of a hang; what an earlier run left in it goes.
        minutes: without a beat; none = no watch.
    """

    def __init__(self, folder: Path, minutes: float | None, world: World):
        self.folder, self.world, self.seconds = folder, world, minutes and 60 * minutes
        self.place = "before the first step"
        self._beaten, self._ended = time.monotonic(), threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def start(self) -> None:
        if self.seconds is None:
            return
        if self.world.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.beat(self.place)
        self._thread.start()

    def beat(self, place: str | None = None) -> None:
        """The main thread goes on.

        Args:
            place: what it begins now, for people; none = as before.
        """
        if self.seconds is None or self._ended.is_set():
            return
        self.place, self._beaten = place or self.place, time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()  # or it might put off once more what is cancelled here
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 10)):
            # Runs in C: it goes off when this thread no longer can put it off.
            faulthandler.dump_traceback_later(self.seconds + 3 * GRACE, exit=True)
            if time.monotonic() - self._beaten > self.seconds:
                with contextlib.suppress(OSError):
                    self._report()
                os._exit(FAILED)

    def _report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.world.rank:05d}"
        with open(self.folder / f"{name}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        with output_file(self.folder / f"{name}.json") as file:
            json.dump({"place": self.place, **position(sys._current_frames()[self._main])}, file)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and len(self._reports()) < self.world.size:
            time.sleep(0.1)
        reports = self._reports()
        if self.world.rank == min(reports):
            minutes = self.seconds / 60
            print(f"error: no progress for {minutes:g} min: {verdict(reports, self.world.size)}; see {self.folder}",
                  file=sys.stderr, flush=True)  # fmt: skip
        else:
            time.sleep(1)  # the launcher ends all when the first rank ends; its line first

    def _reports(self) -> dict[int, dict]:
        return {
            int(path.stem.removeprefix("rank-")): json.loads(path.read_text(encoding="utf-8"))
            for path in self.folder.glob("rank-*.json")
        }


def position(frame) -> dict:
    """Where a thread stands: {"line": "file:line (function)", "waits": inside a collective}."""
    stack = traceback.extract_stack(frame)
    waits = any(part in entry.filename for entry in stack for part in _WAITING)
    own = [entry for entry in stack if not any(part in entry.filename for part in _LIBRARIES)]
    innermost = (own or stack)[-1]
    return {"line": f"{innermost.filename}:{innermost.lineno} ({innermost.name})", "waits": waits}


def verdict(reports: dict[int, dict], size: int) -> str:
    """Who holds up the run, in a sentence."""
    missing = sorted(set(range(size)) - set(reports))
    suspects = [rank for rank in sorted(reports) if not reports[rank]["waits"]]
    if not missing and not suspects:
        suspects = sorted(reports)  # all wait for one another
    said = [f"rank {rank} stands at {reports[rank]['line']}, {reports[rank]['place']}" for rank in suspects[:8]]
    if missing:
        said.append(f"rank {', '.join(map(str, missing[:8]))} gives no sign of life")
    if len(suspects) + len(missing) < size:
        said.append("the others wait")
    return "; ".join(said)
