"""Stopping on request; the STOP file is in test_resume.py, SIGTERM under a launcher in tests/test_train.py."""

import json
import os
import signal
import time

import pytest
from forks import Forks
from launch import journal, write_recipe

from hmde_dist.engine.checkpoint import steps_in
from hmde_dist.engine.stragglers import table


def events(run, name):
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == name]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_any_one_rank_stops_all(number, tmp_path, shards, forks: Forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run={"steps": 5000, "log_every": 1})
    job, run = forks.start(2, recipe), tmp_path / "run"
    while not (run / "journal.jsonl").exists() or len(journal(run)) < 2:
        time.sleep(0.05)
    os.kill(job.pids[1], number)
    ended = forks.wait(job)
    assert ended.codes == [75, 75], ended.output
    (stopped,) = events(run, "stopped")
    assert stopped["reason"] == number.name and steps_in(run / "checkpoints") == [stopped["step"]]


def test_a_time_limit_stops_and_the_slow_rank_has_a_name(tmp_path, shards, forks: Forks):
    slow = """
if rank == 1:
    import time
    inner = train.TrainedModule.forward
    train.TrainedModule.forward = lambda self, batch: (time.sleep(0.2), inner(self, batch))[1]
"""
    run = {"steps": 5000, "log_every": 2, "time_limit_minutes": 0.1}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run=run)
    ended = forks.train(2, recipe, patch=slow)
    assert ended.codes == [75, 75], ended.output
    assert events(tmp_path / "run", "stopped")[0]["reason"] == "run.time_limit_minutes"
    last = events(tmp_path / "run", "ranks")[-1]
    (slowest, seconds, _), _ = last["slowest"]
    assert slowest == 1 and seconds > 0.2 and last["slowest_over_median"] > 1


def test_the_table_names_the_slowest_first():
    rows = [(1.0, 0.0)] * 20
    rows[7], rows[3] = (2.0, 0.0), (1.0, 0.5)
    found = table(rows)
    assert found["slowest"][:2] == [[7, 2.0, 0.0], [3, 1.0, 0.5]] and len(found["slowest"]) == 8
    assert found["slowest_over_median"] == 2.0 and found["wait_seconds"] == 0.0


def test_a_stop_inside_validation_saves_and_the_validation_is_made_up_for(tmp_path, shards, forks: Forks):
    stop = """
import os, signal
from hmde_dist.evaluation import validation
inner = validation.pack
def pack(*a, **k):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(*a, **k)
validation.pack, validation.DOCUMENTS_PER_CALL = pack, 4
"""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        data={"validation": str(shards("mds", "validation"))},
        run={"steps": 4, "log_every": 1, "validate_every": 2},
    )
    run = tmp_path / "run"
    ended = forks.train(2, recipe, patch=stop)
    assert ended.codes == [75, 75], ended.output
    assert [record["step"] for record in journal(run)] == [1, 2] and events(run, "validation") == []
    ended = forks.train(2, recipe)
    assert ended.codes == [0, 0], ended.output
    assert [one["step"] for one in events(run, "validation")] == [2, 4]
    assert [record["step"] for record in journal(run)] == [1, 2, 3, 4]
