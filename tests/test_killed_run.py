"""A run whose ranks are killed with -9, thirty times and more, also while they save, ends as if nothing had happened."""

import json
import random
import time
from pathlib import Path

from forks import Forks, kill
from launch import journal, write_recipe

from hmde_dist.engine import checkpoint

KILLS, IN_SAVES = 30, 10

# Saves of milliseconds would hardly ever be met: these take a tenth of a second, in pieces.
SLOW_SAVES = """
import time
from hmde_dist.engine import checkpoint
checkpoint.CHUNK = 1 << 17
class Saver(train.Saver):
    def __init__(self, *a):
        super().__init__(*a[:-1], lambda: time.sleep(0.02))
train.Saver = Saver
"""


def lines(run):
    path = run / "journal.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(run):
    return any((run / "checkpoints").glob(".step-*.partial")) if (run / "checkpoints").exists() else False


def alive(pid):
    # Until the server of forks waits for it, a rank that has ended is a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_whose_ranks_are_killed_thirty_times_repeats_and_loses_nothing(tmp_path, shards, forks: Forks):
    steps = 160
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        engine={"zero_stage": 2},
        run={"steps": steps, "log_every": 1, "checkpoint_every": 2},
        data={"workers": 1},
        optimizer={"learning_rate": 1e-4},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = forks.wait(forks.start(2, recipe, f"run.folder={whole}"), 600)
    assert job.codes == [0, 0], job.output

    draw, kills, in_saves, reached = random.Random(11), 0, 0, -1
    while kills < KILLS or in_saves < IN_SAVES:
        job = forks.start(2, recipe, f"run.folder={killed}", patch=SLOW_SAVES)
        goal, before = draw.choice(["start", "step", "save", "save"]), lines(killed)
        if goal == "start":
            time.sleep(draw.uniform(0, 2))
        else:
            # After as many records more, so that machines of any speed are killed as often.
            wanted = before + 1 + draw.randint(1, 8)
            while lines(killed) < wanted or (goal == "save" and not saving(killed)):
                assert alive(job.pids[0]) and alive(job.pids[1]), forks.wait(job).output
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.15 if goal == "save" else 0.05))
        in_saves += saving(killed) and goal == "save"
        kill(draw.choice(job.pids))
        forks.wait(job)
        kills += 1
        # What is there is complete, and nothing that was complete is gone.
        found = checkpoint.steps_in(killed / "checkpoints")
        for step in found:
            manifest = checkpoint.read_manifest(killed / "checkpoints" / f"{checkpoint.tag_of(step)}.json")
            for name, facts in manifest["files"].items():
                checkpoint.check_file(killed / "checkpoints" / checkpoint.tag_of(step) / name, facts)
        assert max(found, default=-1) >= reached
        reached = max(found, default=-1)
        assert reached < steps, "the run is over before it was killed often enough"
    job = forks.wait(forks.start(2, recipe, f"run.folder={killed}"), 600)
    assert job.codes == [0, 0], job.output

    # Of a step that was done twice the later line counts.
    losses = [{record["step"]: record["loss"] for record in journal(run)} for run in (whole, killed)]
    assert sorted(losses[1]) == list(losses[0]) == list(range(1, steps + 1)) and losses[0] == losses[1]
    files = [
        json.loads((run / "checkpoints" / f"step-{steps:08d}.json").read_text())["files"] for run in (whole, killed)
    ]
    assert files[0] == files[1]
    assert sorted(path.relative_to(whole).parts[:2] for path in whole.glob("checkpoints/*")) == sorted(
        path.relative_to(killed).parts[:2] for path in killed.glob("checkpoints/*")
    )
    assert not [path for path in killed.rglob("*") if "partial" in path.name]
    print(f"{kills} kills, {in_saves} of them in saves")
