"""Trainings and builds on a real Slurm of four nodes: what ends, stops or breaks them, and what comes out in the end."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import yaml
from cluster import Cluster
from conftest import facts
from launch import PROGRAMS, ROOT, finish, start

from hmde_dist.stream.index import ShardIndex

PROFILE = {"cluster": "slurm", "tasks_per_node": 1, "time_minutes": 60, "partition": "main"}


class Job:
    """A training that was submitted by slurm/launch.py, from `checkout`."""

    def __init__(self, cluster: Cluster, recipe: Path, *arguments, profile: dict | None = None, checkout: Path = ROOT):
        self.cluster, self.run = cluster, recipe.parent / "run"
        profile_file = recipe.with_name("profile.yaml")
        profile_file.write_text(yaml.safe_dump(PROFILE | (profile or {})), encoding="utf-8")
        command = [PROGRAMS / "python", checkout / "slurm/launch.py", recipe, "--profile", profile_file, *arguments]
        self.launched = finish(start(command, cluster.env | {"PYTHONPATH": str(checkout)}, recipe.parent))
        found = re.search(r"job (\d+):", self.launched.output)
        self.id = found.group(1) if found and self.launched.code == 0 else ""

    def wait(self, *states: str, restarts: int = 0) -> dict[str, str]:
        return self.cluster.wait_for_job(self.id, *states, restarts=restarts)

    def events(self) -> list[dict]:
        path = self.run / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if "event" in record]

    def wait_for_checkpoints(self, count: int) -> None:
        """Wait until the training is in full swing."""
        assert self.id, self.launched.output

        def saved():
            return sum(event["event"] == "checkpoint" for event in self.events()) >= count

        self.cluster.wait(saved, f"{count} checkpoints of job {self.id}; it printed {self.output()}", 150)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "jobs").glob(f"{self.id}_*_log.*")))

    def starts(self) -> list[int]:
        """The step at which each attempt began."""
        return [event["step"] for event in self.events() if event["event"] == "start"]


def status(cluster: Cluster, run: Path) -> dict[str, str]:
    job = finish(start([PROGRAMS / "python", ROOT / "slurm/status.py", run], cluster.env))
    assert job.code == 0, job.output
    names, values = (re.split(r" {2,}", line) for line in job.output.splitlines())
    return dict(zip(names, values, strict=True))


def test_two_nodes_of_two_ranks_save_before_their_time_limit_and_go_on(cluster, recipe, uninterrupted):
    """The signal is Slurm's own, in time before the limit. The ranks are halted until it comes: Slurm looks twice a minute."""
    job = Job(cluster, recipe, "--nodes", 2, profile={"tasks_per_node": 2, "signal_lead_seconds": 45})
    job.wait_for_checkpoints(2)
    ranks = cluster.processes(holding="submitit.core._submit")
    assert len(ranks) >= 4
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    cluster("scontrol", "update", f"JobId={job.id}", "TimeLimit=1", check=True)
    try:
        cluster.wait(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in ranks), "the signal", 90)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
    assert job.wait("PENDING", restarts=1)["Requeue"] == "1"
    cluster("scontrol", "update", f"JobId={job.id}", "TimeLimit=60", check=True)
    job.wait("COMPLETED")
    assert job.starts()[0] == 0 and len(job.starts()) == 2
    stopped = [event["step"] for event in job.events() if event["event"] == "stopped"]
    assert stopped == job.starts()[1:] and "exit code 75: requeued" in job.output()
    assert facts(job.run) == uninterrupted(recipe, 4)


def is_pending(pid: int, number: int) -> bool:
    """Whether the signal was sent to a process that is halted."""
    masks = re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_requeued_run_goes_on_with_the_code_that_it_was_submitted_with(cluster, recipe, uninterrupted, tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("hmde_dist", "slurm"):
        shutil.copytree(ROOT / name, checkout / name)
    job = Job(cluster, recipe, "--nodes", 2, checkout=checkout)
    shutil.rmtree(checkout)
    recipe_text = recipe.read_text()
    recipe.write_text("changed: since")
    job.wait_for_checkpoints(2)
    cluster("scontrol", "requeue", job.id, check=True)
    job.wait("COMPLETED", restarts=1)
    assert job.starts()[0] == 0 and len(job.starts()) == 2 and job.starts()[1] >= 6
    recipe.write_text(recipe_text)
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_run_goes_on_elsewhere_when_a_node_dies(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    job.wait_for_checkpoints(2)
    _, second = cluster("scontrol", "show", "hostnames", job.wait("RUNNING")["NodeList"]).split()
    cluster.power_off(second)
    try:
        ended = job.wait("COMPLETED", restarts=1)
    finally:
        cluster.power_on(second)
    assert second not in cluster("scontrol", "show", "hostnames", ended["NodeList"]).split()
    assert len(job.starts()) == 2 and job.starts()[1] >= 6
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_preempted_run_saves_within_its_grace_time_and_comes_back(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    job.wait_for_checkpoints(2)
    other = cluster("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--output=/dev/null", "--wrap=true")
    cluster.wait_for_job(other, "COMPLETED")
    job.wait("COMPLETED", restarts=1)
    stopped = [event["step"] for event in job.events() if event["event"] == "stopped"]
    assert stopped == job.starts()[1:] and "exit code 75: requeued" in job.output()
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_cancelled_run_stays_so_and_goes_on_when_it_is_submitted_again(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    job.wait_for_checkpoints(1)
    now = status(cluster, job.run)
    assert now["job"] == job.id and now["state"] == "running" and now["restarts"] == "0"
    assert 3 <= int(now["steps"].removesuffix("/60")) <= 60 and int(now["documents/s"]) > 0
    second = Job(cluster, recipe, "--nodes", 2)
    assert second.launched.code == 2 and f"job {job.id} (RUNNING) has this run folder" in second.launched.output
    cluster("scancel", job.id, check=True)
    job.wait("CANCELLED")
    # Nothing is left that could requeue it.
    cluster.wait(lambda: not cluster.processes(job=job.id), "the end of every process of the job")
    assert job.wait("CANCELLED")["Restarts"] == "0"
    assert status(cluster, job.run)["state"] == "cancelled"
    again = Job(cluster, recipe, "--nodes", 2)
    again.wait("COMPLETED")
    assert len(again.starts()) == 2 and again.starts()[1] >= 3
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_bad_input_and_a_job_without_restarts_left_are_not_requeued(cluster, recipe, tmp_path):
    other = tmp_path / "other" / "recipe.yaml"
    other.parent.mkdir()
    shutil.copy(recipe, other)
    wrong = Job(cluster, other, f"run.folder={other.parent}/run", "run.resume=must")
    last = Job(cluster, recipe, "run.steps=100000", profile={"max_restarts": 0})
    last.wait_for_checkpoints(1)
    cluster("scancel", "--signal=USR2", last.id, check=True)
    for job, code, message in (
        (wrong, 2, "no complete checkpoint to resume from"),
        (last, 75, "not requeued: max_restarts: 0"),
    ):
        ended = job.wait("FAILED")
        assert (ended["ExitCode"], ended["Restarts"]) == (f"{code}:0", "0"), job.output()
        assert message in job.output()


def test_a_build_is_shared_by_arrays_of_jobs(cluster, documents_folder, tokenizer_folder, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    build = [
        "tools/build_shards.py",
        "--documents",
        documents_folder / "train.jsonl.gz",
        "--tokenizer",
        tokenizer_folder,
    ]
    build += ["--format", "wds", "--out", tmp_path / "shards"]
    launch = [PROGRAMS / "python", "slurm/launch.py", "--profile", profile, "--array", 2, "--", *build]
    job = finish(start(launch, cluster.env | {"PYTHONPATH": str(ROOT)}))
    assert job.code == 0, job.output
    # Each step waits for the one before it to end well.
    cluster.wait_for_job(re.findall(r"job (\d+):", job.output)[-1], "COMPLETED")
    assert ShardIndex.open(tmp_path / "shards").groups == 37
