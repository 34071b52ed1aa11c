"""A rank that hangs, exits or is frozen: the run ends in its time, and says who."""

import os
import signal
import sys
import threading
import time

import pytest
from forks import Forks
from launch import journal, write_recipe

from hmde_dist.engine.hang_watch import position, verdict


def at(line, waits=False):
    return {"line": line, "waits": waits, "place": "in batch 7"}


def test_who_waits_is_not_to_blame():
    reports = {0: at("gather.py:5 (gather)", True), 1: at("sleep.py:3 (nap)"), 2: at("gather.py:5 (gather)", True)}
    assert verdict(reports, 3) == "rank 1 stands at sleep.py:3 (nap), in batch 7; the others wait"
    assert verdict({0: at("a:1 (f)", True)}, 2) == "rank 1 gives no sign of life; the others wait"
    both = verdict({0: at("a:1 (f)", True), 1: at("b:2 (g)", True)}, 2)
    assert "rank 0 stands at a:1 (f)" in both and "rank 1 stands at b:2 (g)" in both


def test_the_position_of_a_thread_is_its_innermost_own_line():
    ready, end = threading.Event(), threading.Event()

    def nap():
        ready.set()
        end.wait()

    thread = threading.Thread(target=nap)
    thread.start()
    ready.wait()
    time.sleep(0.1)
    found = position(sys._current_frames()[thread.ident])
    end.set()
    assert "threading.py" in found["line"] and not found["waits"]


def hang(how: str) -> str:
    """Rank 1 hangs in its third batch."""
    return f"""
import ctypes, os, signal, time
from hmde_dist.engine import hang_watch
hang_watch.GRACE = 1.0
inner = train.next_batch
calls = []
def next_batch(stream, world):
    calls.append(1)
    if rank == 1 and len(calls) == 3:
        {how}
    return inner(stream, world)
train.next_batch = next_batch
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("time.sleep(10**6)", "rank 1 stands at <string>:10 (next_batch), in batch 2; the others wait"),
        # Holds the interpreter's lock, so that no thread of Python runs.
        ("ctypes.PyDLL(None).sleep(10**6)", "rank 1 gives no sign of life; the others wait"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 gives no sign of life; the others wait"),
    ],
    ids=["sleeps", "holds the lock", "frozen"],
)
def test_a_rank_that_hangs_is_named_and_ends_the_run(how, message, tmp_path, shards, forks: Forks):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards("mds"), run={"steps": 5000, "log_every": 1, "hang_minutes": 0.1}
    )
    began = time.monotonic()
    ended = forks.train(2, recipe, patch=hang(how))
    assert time.monotonic() - began < 100
    assert ended.codes[0] == 1 and ended.codes[1] in (1, -signal.SIGKILL), ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: no progress for 0.1 min: ") and message in line
    assert len(journal(tmp_path / "run")) == 2
    reports = tmp_path / "run" / "hang"
    assert "all_reduce" in (reports / "rank-00000.txt").read_text()
    # Whoever held the lock tells later, unless the launcher ends it before.
    if how.startswith("time") or ("PyDLL" in how and ended.codes[1] == 1):
        trace = (reports / "rank-00001.txt").read_text() if how.startswith("time") else ended.output
        assert "in next_batch" in trace


def test_a_rank_that_exits_ends_the_others(tmp_path, shards, forks: Forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run={"steps": 5000, "checkpoint_every": 1})
    ended = forks.train(2, recipe, patch=hang("os._exit(0)"))
    assert ended.codes == [1, 0] and "gloo" in ended.output, ended.output
    again = forks.start(2, recipe, "run.resume=must")
    while len(journal(tmp_path / "run")) < 5:
        time.sleep(0.05)
    os.kill(again.pids[0], signal.SIGTERM)
    assert forks.wait(again).codes == [75, 75]
