"""Builds of many parts: steps of independent tasks, each of which appears on disk whole or not at all.

A build that was stopped, by whatever, is continued by starting it again: what is there is not done twice. Tasks share
nothing but files, so their number of processes, and a spread over the jobs of a Slurm array, change no byte.

    OUT.partial/                 gone when OUT is there
      settings.json              what was asked for; the work is not continued for anything else
      STEP/00012/                what task 12 of a step wrote, and result.json

Owns the order "write aside, rename", the processes, and the count of their memory. Knows nothing of documents.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from hmde_dist.command import InputError, positive, progress

_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


class ShareDone(Exception):
    """The one share of one step that this process was asked for is done."""


def file_facts(paths: Sequence[Path]) -> list[list]:
    """[name, bytes, time of the last change] of each file: what tells in no time that an input changed."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


class Build:
    """The steps that make the folder `out`.

    Use as a context manager: an `InputError` inside it removes the work that this process began (its input has to
    change), everything else keeps it.

    Args:
        settings: everything that the result depends on, as JSON.
        workers: processes of this machine.
        only: run tasks of this step only, as one job of many; the steps before it must be whole.
        share: (i, n): of that step, tasks i, i + n, i + 2 n ...
        quiet: no progress bars and no lines on stdout, because another process shows them.

    Attributes:
        complete: `out` was there already, from a build that was stopped in its last moment.
    """

    def __init__(
        self,
        out: Path,
        settings: dict,
        workers: int,
        only: str | None = None,
        share: tuple[int, int] = (0, 1),
        quiet: bool = False,
    ):
        if only is None and share != (0, 1):
            raise InputError("--share says which tasks of a step: name the step with --step")
        # Resolved: a link or a trailing slash must not part the work from its place.
        self.out, self.workers, self.only, self.share = Path(out).resolve(), workers, only, share
        self.quiet = quiet
        self.work = self.out.with_name(self.out.name + ".partial")
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.complete = self.resumed = False

    def __enter__(self) -> "Build":
        published = self.work / "published"
        for trash in self.out.parent.glob(f".{self.out.name}.trash-*"):
            shutil.rmtree(trash, ignore_errors=True)
        if self.out.is_mount():
            raise InputError(f"{self.out} is a mount point, which cannot be renamed: name a folder in it with --out")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if not published.exists():
                raise InputError(f"{self.out} exists and is not empty: remove it or name another --out")
            self.complete = True
            (self.out / "result.json").unlink(missing_ok=True)
            return self
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.work / "lock", "w")
            # One whole build, or any number of jobs that share its steps.
            _lock_soon(self._lock, fcntl.LOCK_SH if self.only else fcntl.LOCK_EX)
        except BlockingIOError:
            raise InputError(f"{self.work}: another process is at work here") from None
        except OSError as error:
            raise InputError(f"{self.out}: cannot be created ({error.strerror}: {error.filename})") from None
        self._check_settings()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.complete or (kind is not None and issubclass(kind, InputError) and not (self.only or self.resumed)):
            self._discard()

    def _discard(self) -> None:
        """Remove the work. Its name goes first: what a kill leaves of it is not taken for work."""
        trash = self.out.with_name(f".{self.out.name}.trash-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.work.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _check_settings(self) -> None:
        path = self.work / "settings.json"
        # In this order: a job that begins beside this one writes its settings before its first folder.
        begun = any(entry.is_dir() for entry in self.work.iterdir())
        self.resumed = path.exists()
        if begun and not self.resumed:
            raise InputError(f"{self.work} is not the work of a build: remove it, or name another --out")
        if self.resumed:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in self.settings | before if self.settings.get(key) != before.get(key)]
            if changed:
                raise InputError(
                    f"{self.work} holds an unfinished build with other {', '.join(changed)}: start that again, "
                    "or remove the folder"
                )
            return
        partial = path.with_name(f"settings.json.partial-{os.getpid()}")
        partial.write_text(json.dumps(self.settings, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)

    def folder(self, step: str, number: int) -> Path:
        """Where task `number` of a step has written."""
        return self.work / step / f"{number:05d}"

    def run(self, step: str, function: Callable[..., object], tasks: Sequence[tuple]) -> list:
        """The results of `function(folder, *task)` for each task: JSON values, in the order of the tasks.

        `function` writes into the empty folder it is given, and lies at the top level of a module.

        Raises:
            ShareDone: this process was asked for a share of this step.
            InputError: this process was asked for a share of a later step, and this one is not whole.
        """
        results = self._run(step, function, tasks)
        if self.only == step:
            raise ShareDone(step)
        return results

    def finish(self, function: Callable[..., object], task: tuple) -> None:
        """Run the last step, `finish`, of one task, and make its folder the result."""
        self._run("finish", function, [task])
        folder = self.folder("finish", 0)
        (self.work / "published").touch()
        if self.out.exists():
            self.out.rmdir()
        folder.rename(self.out)
        (self.out / "result.json").unlink(missing_ok=True)
        self._discard()

    def _run(self, step: str, function: Callable, tasks: Sequence[tuple]) -> list:
        mine = range(self.share[0], len(tasks), self.share[1]) if self.only == step else range(len(tasks))
        missing = [number for number in mine if not self.folder(step, number).exists()]
        if missing and self.only not in (None, step):
            raise InputError(
                f"{self.work}: step {step} is not whole ({len(missing)} of {len(tasks)} tasks are missing)"
            )
        began = time.monotonic()
        self._do(step, function, tasks, missing)
        records = [json.loads((self.folder(step, number) / "result.json").read_bytes()) for number in mine]
        if records and self.only in (None, step) and not self.quiet:
            before = f", {len(mine) - len(missing)} done before" if len(missing) < len(mine) else ""
            print(
                f"step {step}: {len(mine)} task{'s' * (len(mine) != 1)}{before}, {time.monotonic() - began:.1f} s, "
                f"peak {max(record['peak_mib'] for record in records):.0f} MiB a process",
                flush=True,
            )
        return [record["result"] for record in records]

    def _do(self, step: str, function: Callable, tasks: Sequence[tuple], missing: list[int]) -> None:
        jobs = [(function, self.folder(step, number), tasks[number]) for number in missing]
        workers = min(self.workers, len(jobs))
        with progress(
            total=len(tasks), initial=len(tasks) - len(jobs), desc=step, unit="task", disable=self.quiet
        ) as bar:
            if workers <= 1:
                for job in jobs:
                    _perform(*job)
                    bar.update()
                return
            # Forked: a worker starts in no time, with every module loaded. The executor, unlike
            # multiprocessing.Pool, notices when one is killed for its memory.
            with ProcessPoolExecutor(
                workers, get_context("fork"), initializer=_begin_worker, initargs=(self._lock.fileno(), os.getpid())
            ) as pool:
                try:
                    for done in as_completed([pool.submit(_perform, *job) for job in jobs]):
                        done.result()
                        bar.update()
                except BrokenProcessPool:
                    raise RuntimeError(
                        f"a process of step {step} was killed (out of memory?); start again with fewer --workers"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


def _lock_soon(file, kind: int) -> None:
    """Lock `file`; the last processes of a build that was just killed may hold it for a moment."""
    for attempt in range(50):
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == 49:
                raise
            time.sleep(0.1)


def add_arguments(parser: argparse.ArgumentParser, steps: Iterable[str], threads: bool = False) -> None:
    """Give a command that builds in `steps` the options `--workers`, `--step` and `--share`.

    Args:
        threads: the command works in threads of its libraries, not in processes.
    """
    if threads:
        parser.add_argument("--workers", type=positive, help="threads (OMP_NUM_THREADS, else one for each core)")
    else:
        parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument(
        "--step",
        choices=list(steps),
        metavar="STEP",
        help=f"do this step only, as one of many jobs: {', '.join(steps)}",
    )
    parser.add_argument(
        "--share", type=share, default=(0, 1), metavar="I/N", help="of that step, tasks I, I+N, I+2N ... (0/1: all)"
    )


def share(text: str) -> tuple[int, int]:
    """An argument I/N (for `add_argument(type=...)`)."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f'"{text}" is no share such as 0/4 ... 3/4')
    return int(number), int(of)


def _begin_worker(lock: int, parent: int) -> None:
    os.close(lock)  # else a worker that dies a moment after its parent keeps the next build out
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked for
        os._exit(1)


def _perform(function: Callable, folder: Path, task: tuple) -> None:
    """Run a task in a folder aside, then give it its name."""
    began = time.monotonic()
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / f".lock-{folder.name}", "w") as lock:
        # Of two jobs that were given the same task, the second finds it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _perform_alone(function, folder, task, began)


def _perform_alone(function: Callable, folder: Path, task: tuple, began: float) -> None:
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)
    try:
        result = function(aside, *task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        record = {"result": result, "seconds": round(time.monotonic() - began, 3), "peak_mib": round(peak)}
        (aside / "result.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
