"""Starting real training jobs from tests: several processes, free ports, nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
SENTENCE_TOKENS = 24  # of the shards of fixtures


@dataclass
class Finished:
    code: int
    output: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a job: one thread a rank, no rank variables of an outer job, one-minute collectives."""
    env = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    return env | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONWARNINGS": "ignore"} | changes


def start(command: list, env: dict[str, str] | None = None, folder: Path = ROOT) -> subprocess.Popen:
    """Start a command in a session of its own, output merged."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 150) -> Finished:
    """Wait for a job and end its whole tree, whatever happens."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        end_tree(process.pid)
    return Finished(process.returncode, output)


def end_tree(pid: int) -> None:
    """SIGKILL to the process and all its descendants (launchers give their ranks sessions of their own)."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    doomed = [pid]
    for parent in doomed:
        doomed += children.get(parent, [])
    for victim in doomed:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def torchrun(ranks: int, *arguments) -> list:
    return [PROGRAMS / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port(), *arguments]


def train(ranks: int, recipe: Path, *overrides: str) -> Finished:
    """Train with torchrun; the job's output is in the failure message of an assert on `code`."""
    return finish(start(torchrun(ranks, "hmde_dist/train.py", recipe, *overrides)))


def write_recipe(path: Path, shards: Path, objectives: list[dict] | None = None, **sections: dict) -> Path:
    """A recipe of seconds: width 32, weights large enough for documents to differ, no dropout."""
    tree = {
        "data": {"shards": str(shards), "pairs_per_batch": 8, "sentences": 6, "workers": 0},
        "model": {
            "lower": {
                "config": {
                    "model_type": "bert",
                    "hidden_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 64,
                    "max_position_embeddings": 40,
                    "initializer_range": 0.2,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                },
                "pooling": "mean",
            },
            "upper": {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.0},
        },
        "optimizer": {"learning_rate": 0.01},
        "run": {"folder": str(path.parent / "run"), "steps": 3, "log_every": 1},
    }
    if objectives:
        tree["objectives"] = objectives
    for section, settings in sections.items():
        tree.setdefault(section, {}).update(settings)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def journal(run: Path) -> list[dict]:
    """The step records of a run folder."""
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def write_documents(path: Path, documents) -> Path:
    """Write documents as JSON lines; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(document.as_json() + "\n" for document in documents), encoding="utf-8")
    return path
