"""How runs stand, without a Slurm (with one: tests/slurm/)."""

import json
import os
import runpy
import sys
import time

import pytest
from launch import ROOT

from hmde_dist.command import InputError
from hmde_dist.run_status import duration, run_status, slurm_jobs, status_table


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps, 40 of them done in two attempts, that last wrote 90 seconds ago."""
    folder = tmp_path / "run"
    (folder / "jobs").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {steps: 100}\n")
    records = [
        {"event": "start", "step": 0},
        {"step": 30, "documents": 480, "loss": 1.0, "documents_per_second": 7.0},
        {"event": "start", "step": 20},
        {"step": 40, "documents": 640, "loss": 0.5, "documents_per_second": 8.0},
    ]
    path = folder / "journal.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 41, "docu')
    os.utime(path, (time.time() - 90,) * 2)
    return folder


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_run_is_read_while_it_writes(run, no_slurm):
    status = run_status(run)
    assert (status.step, status.steps, status.restarts, status.job, status.state) == (40, 100, 1, None, "started")
    # 60 steps of 16 documents at 8 a second.
    assert status.documents_per_second == 8 and status.seconds_left == 120
    assert 89 <= status.silent_seconds <= 120


@pytest.mark.parametrize(("event", "state"), [("stopped", "stopped"), ("done", "done"), ("gave_up", "gave up")])
def test_the_journal_says_how_it_ended(event, state, run, no_slurm):
    with open(run / "journal.jsonl", "a") as file:
        file.write('ments": 656}\n' + json.dumps({"event": event, "step": 40}) + "\n")
    assert run_status(run).state == state


def test_a_run_that_waits_for_its_first_step_has_a_job_and_no_journal(tmp_path, no_slurm):
    jobs = tmp_path / "run" / "jobs"
    (jobs / "code-0").mkdir(parents=True)
    (jobs / "code-0" / "recipe.yaml").write_text("run: {steps: 7}\n")
    for id in (9, 10):
        (jobs / f"{id}_submitted.pkl").touch()
    status = run_status(tmp_path / "run")
    assert (status.job, status.state, status.step, status.steps) == ("10", "waiting", 0, 7)
    assert status.documents_per_second is status.seconds_left is None


def test_slurm_answers_for_the_queue_and_its_accounting_for_the_rest(tmp_path, monkeypatch):
    answers = {
        "squeue": "echo '7|RUNNING|2|'",
        "sacct": "printf '7|REQUEUED\\n6|CANCELLED by 0\\n'",
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    jobs = slurm_jobs(["6", "7", "8"])
    assert (jobs["7"].state, jobs["7"].restarts, jobs["7"].alive) == ("RUNNING", 2, True)
    assert (jobs["6"].state, jobs["6"].restarts, jobs["6"].alive) == ("CANCELLED", None, False)
    assert "8" not in jobs


def test_the_table_has_a_line_a_run_and_names_what_is_no_run(run, no_slurm, tmp_path, monkeypatch, capsys):
    names, line = status_table([run_status(run)]).splitlines()
    assert names.split()[:4] == ["run", "job", "state", "steps"]
    assert line.split()[1:7] == ["-", "started", "40/100", "1", "8", "2:00"]
    monkeypatch.setattr(sys, "argv", ["status.py", str(run), str(tmp_path)])
    with pytest.raises(InputError, match="no run folder"):
        runpy.run_path(str(ROOT / "slurm" / "status.py"))["main"]()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (95, "1:35"), (3600, "1:00:00"), (90061, "1d 1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text
