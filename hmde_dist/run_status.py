"""How runs stand: from their run folders, and from Slurm for the jobs that were submitted with them.

Reads only; works on a machine without Slurm, and while a run writes.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from hmde_dist.command import InputError

# A job in one of these states may still run.
ALIVE = set("PENDING CONFIGURING RUNNING SIGNALING COMPLETING SUSPENDED STOPPED REQUEUED REQUEUE_HOLD".split())


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it."""

    state: str
    restarts: int | None = None  # the queue knows it, the accounting does not

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def job_ids(jobs: Path) -> list[str]:
    """The jobs that were submitted with the folder `jobs` of a run, oldest first."""
    return sorted((path.name.split("_")[0] for path in jobs.glob("*_submitted.pkl")), key=int)


def slurm_jobs(ids: Sequence[str]) -> dict[str, JobState]:
    """What Slurm knows of these jobs: from the queue, and for ended ones from the accounting; {} without Slurm."""
    known: dict[str, JobState] = {}
    jobs = f"--jobs={','.join(ids)}"
    commands = [
        ["squeue", "--noheader", "--states=all", "--Format=JobID:|,State:|,RestartCnt:|", jobs],
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", jobs],
    ]
    for command in commands:
        if set(ids) <= set(known):
            break
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            continue
        for line in done.stdout.splitlines():
            id, state, *restarts = line.strip("|").split("|")
            known.setdefault(id, JobState(state.split()[0], int(restarts[0]) if restarts else None))
    return known


@dataclass(frozen=True)
class RunStatus:
    """One run. None: not known."""

    folder: Path
    job: str | None
    state: str
    step: int
    steps: int
    restarts: int
    documents_per_second: float | None
    seconds_left: float | None
    silent_seconds: float


def run_status(folder: Path) -> RunStatus:
    """How the run in `folder` stands.

    Raises:
        InputError: the folder is no run folder.
    """
    ids = job_ids(folder / "jobs")
    jobs = slurm_jobs(ids) if ids else {}
    records = _journal(folder / "journal.jsonl")
    if not records and not ids:
        raise InputError(f"{folder}: no journal.jsonl and no jobs/, so no run folder")
    job = jobs.get(ids[-1]) if ids else None
    events = [record["event"] for record in records if "event" in record]
    training = [record for record in records if "loss" in record]
    last = training[-1] if training else {"step": 0, "documents": 0, "documents_per_second": None}
    steps = _steps(folder, ids)
    rate, left = last["documents_per_second"], None
    if rate and last["step"]:
        left = (steps - last["step"]) * last["documents"] / last["step"] / rate
    # A run that is killed leaves no event: without Slurm it looks like one that goes on, but for its silence.
    names = {"start": "started", "stopped": "stopped", "done": "done", "gave_up": "gave up"}
    told = [names[event] for event in events if event in names]
    by_journal = told[-1] if told else "waiting"
    written = [path for path in (folder / "journal.jsonl", folder / "jobs") if path.exists()]
    return RunStatus(
        folder=folder,
        job=ids[-1] if ids else None,
        state=job.state.lower() if job else by_journal,
        step=last["step"],
        steps=steps,
        restarts=max(0, events.count("start") - 1),
        documents_per_second=rate,
        seconds_left=left,
        silent_seconds=datetime.now(UTC).timestamp() - written[0].stat().st_mtime,
    )


def status_table(runs: Sequence[RunStatus]) -> str:
    """The runs as aligned text, one a line."""
    rows = [("run", "job", "state", "steps", "restarts", "documents/s", "ETA", "last line")]
    for run in runs:
        rate, left = run.documents_per_second, run.seconds_left
        rows.append(
            (
                str(run.folder),
                run.job or "-",
                run.state,
                f"{run.step}/{run.steps}",
                str(run.restarts),
                "-" if rate is None else f"{rate:.0f}",
                "-" if left is None else duration(left),
                f"{duration(run.silent_seconds)} ago",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def duration(seconds: float) -> str:
    """`95` -> `1:35`, `90061` -> `1d 1:01:01`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days}d {clock}" if days else clock


def _journal(path: Path) -> list[dict]:
    """The records of a journal; a last line that is being written is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _steps(folder: Path, ids: Sequence[str]) -> int:
    """The steps of the whole run; before it has begun, as its newest job was submitted."""
    recipes = sorted(folder.glob("jobs/code-*/recipe.yaml"), key=lambda path: path.stat().st_mtime)
    recipe = folder / "config.yaml"
    if not recipe.exists() and recipes:
        recipe = recipes[-1]
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["run"]["steps"]
