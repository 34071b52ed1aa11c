"""The journal: one JSON object per logged step and per event, the same in TensorBoard, and one line on the terminal.

Only the first rank writes. The run folder is described in `docs/how-it-works.md`.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from hmde_dist.command import code_commit, output_file, remove_partials
from hmde_dist.recipe import Recipe, dump_recipe
from hmde_dist.topology import World


class Journal:
    """The records of one run folder, appended to on resume."""

    def __init__(self, recipe: Recipe, world: World, first_step: int):
        self.world, self.steps = world, recipe.run.steps
        self.first_step, self.began = first_step, time.perf_counter()
        if not world.is_first:
            return
        folder = recipe.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        with output_file(folder / "config.yaml") as file:
            file.write(dump_recipe(recipe))
        with output_file(folder / "env.json") as file:
            json.dump(environment(world), file, indent=1)
        self.file = open(folder / "journal.jsonl", "a", encoding="utf-8", buffering=1)
        self.folder = folder / "tensorboard"
        self._open_board(first_step)
        self.event("start", step=first_step, world=world.size)

    def _open_board(self, first_step: int) -> None:
        # purge_step: what an interrupted run logged beyond its last checkpoint is not shown twice.
        self.board = SummaryWriter(str(self.folder), purge_step=first_step + 1)

    def event(self, name: str, **facts) -> None:
        if self.world.is_first:
            self._write({"event": name, **facts})

    def skipped(self, step: int, facts: dict) -> None:
        """A step that was not applied after `step`: its batch, and why (see `engine.guard`)."""
        bad = {"bad_loss": facts["loss"], "bad_grad_norm": facts["grad_norm"]}  # "loss" is for steps
        self.event("skipped", step=step, batch=facts["batch"], reason=facts["reason"], **bad)
        if self.world.is_first:
            self.board.add_scalar("guard/skipped_batch", facts["batch"], step)
            print(f"step {step + 1}: batch {facts['batch']} is skipped: {facts['reason']}", file=sys.stderr, flush=True)

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step."""
        self.event("rollback", step=step)
        if self.world.is_first:
            self.board.close()
            self._open_board(step)
            self.board.add_scalar("guard/rollback", step, step)

    def ranks(self, step: int, table: dict) -> None:
        """What the ranks' own work took (see `engine.stragglers`)."""
        self.event("ranks", step=step, **table)
        if self.world.is_first:
            for key in ("forward_seconds", "wait_seconds", "slowest_over_median"):
                self.board.add_scalar(f"ranks/{key}", table[key], step)
            self.board.add_scalar("ranks/slowest", table["slowest"][0][0], step)

    def step(self, record: dict) -> None:
        """Log a training step (see the contract in `docs/how-it-works.md` for the keys)."""
        if not self.world.is_first:
            return
        self._write(record)
        for key, value in record.items():
            if key != "step":
                self.board.add_scalar(f"train/{key}", value, record["step"])
        done = record["step"] - self.first_step
        left = (time.perf_counter() - self.began) / max(1, done) * (self.steps - record["step"])
        width = len(str(self.steps))
        print(
            f"step {record['step']:>{width}}/{self.steps}  loss {record['loss']:.3f}  accuracy {record['accuracy']:.3f}  "
            f"{record['documents_per_second']:.0f} documents/s  wait {record['data_wait_fraction']:.0%}  "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}",
            flush=True,
        )

    def validation(self, step: int, scores: dict[str, float]) -> None:
        if not self.world.is_first:
            return
        self._write({"event": "validation", "step": step, **scores})
        for key, value in scores.items():
            self.board.add_scalar(f"validation/{key}", value, step)
        print(
            f"step {step}: validation " + "  ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True
        )

    def projector(self, step: int, vectors: np.ndarray, names: Sequence[str], labels: Sequence[Sequence[str]]) -> None:
        """Labelled vectors [n, W] for TensorBoard's projector; `names` of what each of the labels says."""
        if self.world.is_first:
            # A tab or line break would end a label in the file.
            rows = [[" ".join(label.split()) or "-" for label in row] for row in labels]
            self.board.add_embedding(vectors, rows, global_step=step, tag="validation", metadata_header=list(names))

    def close(self) -> None:
        if self.world.is_first:
            self.board.close()
            self.file.close()

    def _write(self, record: dict) -> None:
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
        self.file.write(json.dumps(record) + "\n")


def environment(world: World) -> dict:
    """Versions and machine, for `env.json`."""
    import deepspeed
    import numpy
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "ranks": world.size,
        "commit": code_commit(),
        "command": sys.argv,
    }
