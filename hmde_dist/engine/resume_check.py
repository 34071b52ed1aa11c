"""Proof that a recipe resumes: it is trained without interruption, and again from a checkpoint in its middle.

The second run starts from what a run that was killed in the middle would have left. On the same ranks it must repeat losses and
weights bit for bit; on others it must see the same batches, and losses may differ by the order of sums (dropout is drawn for
each rank, so with dropout losses on other ranks are shown and not judged).
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hmde_dist.command import InputError, RunError
from hmde_dist.engine import checkpoint
from hmde_dist.recipe import Recipe, dump_recipe

TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}  # of losses on other ranks, relative
COMPARED = ("batch", "documents", "tokens", "learning_rate")  # alike in every world


@dataclass(frozen=True)
class Row:
    """How a resumed run compares with the uninterrupted one."""

    name: str
    batches: bool  # the same ones, step by step
    loss: float  # largest relative difference
    weights: float  # relative difference of all of them
    holds: bool  # as promised


def reduced(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """The recipe for `steps` steps in another folder, with a checkpoint in the middle and no validation."""
    run = {
        "folder": folder,
        "steps": steps,
        "log_every": 1,
        "checkpoint_every": steps // 2,
        "keep_checkpoints": steps,
        "resume": "auto",
        "time_limit_minutes": None,
    }
    warm = {"warmup_steps": min(recipe.optimizer.warmup_steps, steps)}
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "optimizer": recipe.optimizer.model_copy(update=warm),
            "data": recipe.data.model_copy(update={"validation": None}),
        }
    )


def verify_resume(recipe: Recipe, ranks: int, other: int | None, steps: int, folder: Path, said=print) -> list[Row]:
    """Train on `ranks` ranks, resume on as many and on `other`; returns a row for each resumed run.

    Args:
        folder: temporary, for the runs.
        said: called with a line before each run.

    Raises:
        InputError: `steps` has no middle.
        RunError: a run failed; its last lines are in the message.
    """
    if steps < 2:
        raise InputError("--steps must be 2 or more")
    middle = steps // 2
    said(f"{steps} steps on {ranks} ranks, without interruption")
    whole = _train(reduced(recipe, steps, folder / "whole"), ranks)
    rows = []
    for count in filter(None, (ranks, other)):
        said(f"steps {middle + 1} to {steps} on {count} ranks, from the checkpoint of step {middle}")
        run = folder / f"resumed-on-{count}"
        shutil.copytree(whole / "checkpoints", run / "checkpoints")
        checkpoint.remove_after(run / "checkpoints", middle)
        _train(reduced(recipe, steps, run), count)
        rows.append(_compare(whole, run, f"resumed on {count} ranks", middle, count == ranks, recipe.engine.precision))
    return rows


def _train(recipe: Recipe, ranks: int) -> Path:
    run = recipe.run.folder
    run.mkdir(parents=True, exist_ok=True)
    file = run.parent / f"{run.name}.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    program = Path(__file__).parent.parent / "train.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    job = subprocess.run(
        [*launcher, program, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if job.returncode:
        errors = [line for line in job.stdout.splitlines() if line.startswith("error: ")]
        raise RunError(f"{run.name}: " + (errors or job.stdout.strip().splitlines()[-5:] or ["no output"])[0])
    return run


def _steps(run: Path) -> dict[int, dict]:
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record for record in records if "loss" in record}


def _compare(whole: Path, run: Path, name: str, middle: int, same_ranks: bool, precision: str) -> Row:
    one, other = _steps(whole), _steps(run)
    alike = sorted(other) == [step for step in one if step > middle]
    batches = alike and all(one[step][key] == other[step][key] for step in other for key in COMPARED)
    loss = max(abs(other[step]["loss"] / one[step]["loss"] - 1) for step in other) if alike else float("inf")
    expected, found = (torch.cat([t.double().flatten() for t in _weights(folder)]) for folder in (whole, run))
    weights = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    if same_ranks:
        holds = batches and loss == 0 and _files(whole) == _files(run)
    else:
        holds = batches and (loss <= TOLERANCE[precision] or _has_dropout(whole))
    return Row(name, batches, loss, weights, holds)


def _weights(run: Path) -> list[torch.Tensor]:
    weights, _ = checkpoint.load_weights(run)
    return [weights[name] for name in sorted(weights)]


def _files(run: Path) -> dict:
    """Checksums of the last checkpoint: of weights and moments, bit for bit."""
    folder = run / "checkpoints"
    return checkpoint.read_manifest(folder / f"{checkpoint.tag_of(checkpoint.steps_in(folder)[-1])}.json")["files"]


def _has_dropout(run: Path) -> bool:
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    rates = [value for name, value in (config["lower"] | config).items() if "dropout" in name]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
