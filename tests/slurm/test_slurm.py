"""Trainings and builds on a real Slurm of four nodes: what ends, stops or breaks them, and what comes out in the end."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, missing
from launch import PROGRAMS, ROOT, finish, journal, start, write_recipe

from hmde_dist.stream.index import ShardIndex

STEPS = 80
PROFILE = {"cluster": "slurm", "tasks_per_node": 1, "time_minutes": 60, "partition": "main"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4)
    yield cluster
    cluster.stop()


@pytest.fixture
def recipe(tmp_path, shards) -> Path:
    """A training that ends by itself after `STEPS` steps and saves every fourth; dropout on, ZeRO 1."""
    return write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        model={"upper": {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.3}},
        engine={"zero_stage": 1, "self_test": False},
        run={"folder": str(tmp_path / "run"), "steps": STEPS, "log_every": 1, "checkpoint_every": 4},
    )


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, forks) -> Callable[[Path, int], list[tuple]]:
    """`uninterrupted(recipe, ranks)`: the facts of every step of a run outside of Slurm that nothing stopped."""
    made: dict[int, list[tuple]] = {}

    def run(recipe: Path, ranks: int) -> list[tuple]:
        if ranks not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            job = forks.wait(forks.start(ranks, recipe, f"run.folder={folder}"), 400)
            assert job.codes == [0] * ranks, job.output
            made[ranks] = facts(folder)
            assert [step for step, *_ in made[ranks]] == list(range(1, STEPS + 1))
        return made[ranks]

    return run


def facts(run: Path) -> list[tuple]:
    """What a step of the same run must repeat bit for bit; of a step that was done twice the later line counts."""
    names = ("step", "loss", "grad_norm", "tokens", "documents", "learning_rate")
    steps = {record["step"]: tuple(record[name] for name in names) for record in journal(run)}
    return [steps[step] for step in sorted(steps)]


class Job:
    """A training that was submitted by slurm/launch.py, from `checkout`."""

    def __init__(self, cluster: Cluster, recipe: Path, *arguments, profile: dict | None = None, checkout: Path = ROOT):
        self.cluster, self.run = cluster, recipe.parent / "run"
        profile_file = recipe.with_name("profile.yaml")
        profile_file.write_text(yaml.safe_dump(PROFILE | (profile or {})), encoding="utf-8")
        command = [PROGRAMS / "python", checkout / "slurm/launch.py", recipe, "--profile", profile_file, *arguments]
        self.launched = finish(start(command, cluster.env | {"PYTHONPATH": str(checkout)}, recipe.parent), 400)
        found = re.search(r"job (\d+):", self.launched.output)
        self.id = found.group(1) if found and self.launched.code == 0 else ""

    def wait(self, *states: str, restarts: int = 0) -> dict[str, str]:
        return self.cluster.wait_for_job(self.id, *states, restarts=restarts)

    def events(self) -> list[dict]:
        path = self.run / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if "event" in record]

    def halt_in_full_swing(self) -> list[int]:
        """Wait for two checkpoints and halt the ranks, so that what comes next meets them there; their process ids.

        Slurm wakes them itself before it sends a signal of its own.
        """
        assert self.id, self.launched.output

        def saved():
            return sum(event["event"] == "checkpoint" for event in self.events()) >= 2

        try:
            self.cluster.wait(saved, "two checkpoints")
        except AssertionError as error:
            raise AssertionError(f"{error}\njob {self.id} printed {self.output()}") from None
        ranks = self.cluster.processes(job=self.id, program="python")
        send(ranks, signal.SIGSTOP)
        return ranks

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "jobs").glob(f"{self.id}_*_log.*")))

    def starts(self) -> list[int]:
        """The step at which each attempt began."""
        return [event["step"] for event in self.events() if event["event"] == "start"]

    def went_on_from_where_it_stopped(self) -> bool:
        """It was stopped once, saved, and the second attempt began there."""
        stopped = [event["step"] for event in self.events() if event["event"] == "stopped"]
        return len(stopped) == 1 and self.starts() == [0, *stopped]


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def status(cluster: Cluster, run: Path) -> dict[str, str]:
    job = finish(start([PROGRAMS / "python", ROOT / "slurm/status.py", run], cluster.env), 400)
    assert job.code == 0, job.output
    names, values = (re.split(r" {2,}", line) for line in job.output.splitlines())
    return dict(zip(names, values, strict=True))


def test_two_nodes_of_two_ranks_save_before_their_time_limit_and_go_on(cluster, recipe, uninterrupted):
    """The signal is Slurm's own, before the limit; Slurm looks twice a minute."""
    job = Job(cluster, recipe, "--nodes", 2, profile={"tasks_per_node": 2, "signal_lead_seconds": 100})
    job.halt_in_full_swing()
    hours, minutes, _ = job.wait("RUNNING")["RunTime"].split(":")
    # One to two minutes from now.
    cluster("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}", check=True)
    job.wait("PENDING", restarts=1)
    cluster("scontrol", "update", f"JobId={job.id}", "TimeLimit=60", check=True)
    job.wait("COMPLETED")
    assert job.went_on_from_where_it_stopped() and "exit code 75: requeued" in job.output()
    assert facts(job.run) == uninterrupted(recipe, 4)


def test_a_requeued_run_goes_on_with_the_code_that_it_was_submitted_with(cluster, recipe, uninterrupted, tmp_path):
    checkout, text = tmp_path / "checkout", recipe.read_text()
    for name in ("hmde_dist", "slurm"):
        shutil.copytree(ROOT / name, checkout / name)
    job = Job(cluster, recipe, "--nodes", 2, checkout=checkout)
    shutil.rmtree(checkout)
    recipe.write_text("changed: since")
    job.halt_in_full_swing()
    cluster("scontrol", "requeue", job.id, check=True)
    job.wait("COMPLETED", restarts=1)
    recipe.write_text(text)
    assert job.went_on_from_where_it_stopped()
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_run_goes_on_elsewhere_when_a_node_dies(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    ranks = job.halt_in_full_swing()
    _, second = cluster("scontrol", "show", "hostnames", job.wait("RUNNING")["NodeList"]).split()
    cluster.power_off(second)
    send([pid for pid in ranks if Path(f"/proc/{pid}").exists()], signal.SIGCONT)
    try:
        ended = job.wait("COMPLETED", restarts=1)
    finally:
        cluster.power_on(second)
    assert second not in cluster("scontrol", "show", "hostnames", ended["NodeList"]).split()
    assert len(job.starts()) == 2 and job.starts()[1] >= 8
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_run_that_slurm_restarted_elsewhere_ends_where_it_still_runs(cluster, recipe, uninterrupted):
    """The slurmd of a node is gone, the rank is not: two would write to one run folder."""
    job = Job(cluster, recipe)
    (rank,) = job.halt_in_full_swing()
    node = job.wait("RUNNING")["NodeList"]
    cluster.power_off(node, ranks=False)
    try:
        cluster.wait(lambda: len(job.starts()) == 2, f"another attempt; {job.id} printed {job.output()}")
        send([rank], signal.SIGCONT)
        cluster.wait(lambda: rank not in cluster.processes(job=job.id), "the end of the first attempt")
        job.wait("COMPLETED", restarts=1)
    finally:
        cluster.power_on(node)
    assert f"attempt {job.id}_1 has the run folder, {job.id}_0 ends" in job.output()
    assert job.starts()[0] == 0 and job.starts()[1] >= 8
    assert facts(job.run) == uninterrupted(recipe, 1)


def test_a_preempted_run_saves_within_its_grace_time_and_comes_back(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    job.halt_in_full_swing()
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.wait_for_job(cluster("sbatch", "--parsable", *urgent), "COMPLETED")
    job.wait("COMPLETED", restarts=1)
    assert job.went_on_from_where_it_stopped() and "exit code 75: requeued" in job.output()
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_a_cancelled_run_stays_so_and_goes_on_when_it_is_submitted_again(cluster, recipe, uninterrupted):
    job = Job(cluster, recipe, "--nodes", 2)
    job.halt_in_full_swing()
    now = status(cluster, job.run)
    assert (now["job"], now["state"], now["restarts"]) == (job.id, "running", "0")
    assert 8 <= int(now["steps"].removesuffix(f"/{STEPS}")) < STEPS and int(now["documents/s"]) > 0
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
    assert again.went_on_from_where_it_stopped()
    assert facts(job.run) == uninterrupted(recipe, 2)


def test_bad_input_and_a_job_without_restarts_left_are_not_requeued(cluster, recipe, tmp_path):
    other = tmp_path / "other" / "recipe.yaml"
    other.parent.mkdir()
    shutil.copy(recipe, other)
    wrong = Job(cluster, other, f"run.folder={other.parent}/run", "run.resume=must")
    last = Job(cluster, recipe, "run.steps=100000", profile={"max_restarts": 1})
    # Once while it starts, once while it trains.
    cluster.wait(lambda: cluster.processes(job=last.id, program="python"), f"the rank of job {last.id}")
    cluster("scancel", "--signal=USR2", last.id, check=True)
    last.wait("RUNNING", restarts=1)
    ranks = last.halt_in_full_swing()
    cluster("scancel", "--signal=USR2", last.id, check=True)
    send(ranks, signal.SIGCONT)
    for job, code, restarts, message in (
        (wrong, 2, 0, "no complete checkpoint to resume from"),
        (last, 75, 1, "not requeued: max_restarts: 1"),
    ):
        ended = job.wait("FAILED")
        assert (ended["ExitCode"], ended["Restarts"]) == (f"{code}:0", str(restarts)), job.output()
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
    job = finish(start(launch, cluster.env | {"PYTHONPATH": str(ROOT)}), 400)
    assert job.code == 0, job.output
    # Each step waits for the one before it to end well.
    cluster.wait_for_job(re.findall(r"job (\d+):", job.output)[-1], "COMPLETED")
    assert ShardIndex.open(tmp_path / "shards").groups == 37


def test_an_ablation_is_an_array_with_a_job_for_each_cell(cluster, recipe, small_corpus, tmp_path):
    """Two ranks under torchrun in the job; the job runs the code of the submission."""
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    ablate = [PROGRAMS / "python", "tools/ablate.py", recipe, "--seeds", 3, "--documents", small_corpus]
    ablate += ["--out", tmp_path / "out", "--ranks", 2, "run.steps=2", "engine.self_test=false"]
    job = finish(start([*ablate, "--profile", tmp_path / "profile.yaml"], cluster.env | {"PYTHONPATH": str(ROOT)}), 400)
    assert job.code == 0 and "1 cells: logs in" in job.output, job.output
    cluster.wait_for_job(re.findall(r"job (\d+),", job.output)[-1], "COMPLETED")
    job = finish(start([*ablate, "--report-only"], cluster.env), 400)
    assert job.code == 0, job.output
    result = json.loads((tmp_path / "out" / "recipe" / "seed-3" / "result.json").read_text())
    assert (result["ranks"], result["pairs"]) == (2, 16)
    assert f"| recipe | 1 | **{result['scores']['R@1']:.3f}** |" in job.output
    log = (tmp_path / "out" / "recipe" / "seed-3" / "log.txt").read_text()
    assert f"{tmp_path}/out/jobs/code-" in log and f"{ROOT}/tools" not in log
