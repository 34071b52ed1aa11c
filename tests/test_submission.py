import re
import runpy
import subprocess
import sys

import pytest
from launch import PROGRAMS, ROOT, environment, finish, journal, start, write_recipe

from hmde_dist.command import InputError, code_commit
from hmde_dist.corpus import shard_build
from hmde_dist.submission import Profile, batch_script, load_profile, take_snapshot


def launch(*arguments):
    return finish(start([PROGRAMS / "python", "slurm/launch.py", *arguments], environment()))


def test_a_job_on_this_machine_trains_on_its_two_ranks(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    job = launch(recipe, "--profile", "local", "run.steps=2")
    assert job.code == 0, job.output
    assert "exit codes of the ranks: 0 0" in job.output
    assert [record["documents"] for record in journal(tmp_path / "run")] == [16, 32]
    assert len(list((tmp_path / "run" / "jobs").glob("*_log.out"))) == 2


def test_the_batch_script_asks_for_what_the_profile_says(tmp_path):
    profile = Profile(
        cluster="slurm",
        tasks_per_node=4,
        gpus_per_node=4,
        time_minutes=90,
        account="me",
        setup=["module load x"],
        python="apptainer exec --nv hmde.sif python",
        srun=["--cpu-bind=cores"],
        options={"mem": "200G", "exclusive": True},
        max_restarts=7,
    )
    script = batch_script(profile, 3, "name", tmp_path)
    for line in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "account=me", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in script
    for line in ("requeue", "mem=200G", "exclusive"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1 --cpu-bind=cores apptainer exec --nv hmde.sif python -u -m submitit" in script
    assert script.index("module load x") < script.index("export PYTHONSAFEPATH=1 PYTHONPATH=") < script.index("srun")
    assert "partition" not in script and "max_restarts: 7" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_dry_run_submits_nothing(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    job = launch(recipe, "--profile", "gpu", "--nodes", "2", "--dry-run", "run.steps=77", "data.pairs_per_batch=16")
    assert job.code == 0, job.output
    assert "#SBATCH --nodes=2" in job.output and "steps: 77" in job.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("cluster: slurm\ntasks: 3\n", "tasks_per_node: Field required; tasks: Extra"),
        ("cluster: slurm\ntasks_per_node: 1\ngpus_per_node: 8", "bad.yaml: tasks_per_node must be gpus_per_node"),
        ("cluster: slurm\ntasks_per_node: 1\ntime_minutes: 2", "signal_lead_seconds is longer than time_minutes"),
        ("cluster: slurm\ntasks_per_node: 1\noptions: {time: 5, mem: 1G}", "options: time follows from other settings"),
        ("cluster: local\ntasks_per_node: 1\npartition: x", "partition: nothing that cluster: local has"),
        ("cluster: [", "bad.yaml: while parsing"),
    ],
)
def test_wrong_profiles_are_named(settings, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(settings)
    with pytest.raises(InputError, match=re.escape(message)):
        load_profile(tmp_path / "bad.yaml")


def test_a_profile_is_a_name_or_a_file(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    missing = launch(recipe, "--profile", "elsewhere", "--dry-run")
    assert missing.code == 2 and "there are: cpu, gpu, local" in missing.output
    own = tmp_path / "own.yaml"
    own.write_text("cluster: slurm\ntasks_per_node: 2\npartition: mine\n")
    job = launch(recipe, "--profile", own, "--dry-run")
    assert job.code == 0 and "#SBATCH --partition=mine" in job.output, job.output


def test_a_snapshot_is_named_by_its_content_and_holds_the_package(tmp_path):
    one = take_snapshot(tmp_path, {"recipe.yaml": b"one"})
    assert take_snapshot(tmp_path, {"recipe.yaml": b"one"}) == one
    assert take_snapshot(tmp_path, {"recipe.yaml": b"two"}) != one
    assert (one / "recipe.yaml").read_bytes() == b"one"
    assert (one / "commit").read_text() == code_commit()
    package = ROOT / "hmde_dist"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    assert {str(path.relative_to(one)) for path in one.rglob("*.py")} == wanted
    assert (one / "hmde_dist" / "train.py").read_bytes() == (package / "train.py").read_bytes()


def test_a_build_becomes_a_chain_of_job_arrays(tmp_path):
    command = ("tools/build_shards.py", "--documents", "d.jsonl", "--tokenizer", "t", "--format", "mds")
    job = launch("--profile", "cpu", "--array", "5", "--dry-run", "--", *command, "--out", tmp_path / "out")
    assert job.code == 0, job.output
    scripts = job.output.split("#!/bin/bash")[1:]
    assert [("--array=0-4" in script) for script in scripts] == list(shard_build.STEPS.values())
    waits = [f"--dependency='afterok:<id of {step}>'" for step in list(shard_build.STEPS)[:-1]]
    assert "dependency" not in scripts[0]
    assert all(wait in script for wait, script in zip(waits, scripts[1:], strict=True))
    assert not list(tmp_path.iterdir())


def test_jobs_that_encode_have_a_gpu_each(tmp_path):
    command = ("tools/encode.py", "--model", "m", "--documents", "d.jsonl", "--out", tmp_path / "out")
    for profile, lines in (("gpu", 3), ("cpu", 0)):
        job = launch("--profile", profile, "--array", "5", "--dry-run", "--", *command)
        assert job.code == 0 and job.output.count("#SBATCH --gpus-per-node=1\n") == lines, job.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--array", "2"), "give RECIPE, or --array N -- COMMAND"),
        (("recipe.yaml", "--array", "2", "--", "tools/build_shards.py"), "give RECIPE, or --array N -- COMMAND"),
        (("--array", "2", "--", "tools/export.py", "--out", "x"), "only tools/build_documents.py wikipedia, build_sh"),
        (("--array", "2", "--", "tools/build_shards.py"), "needs one --out"),
        ((), "give RECIPE"),
        (("--array", "2", "--", "tools/build_shards.py", "--out", "x", "--workers", "3"), "--workers: set by the jobs"),
    ],
)
def test_what_cannot_be_an_array_is_said(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--profile", "cpu", *arguments])
    with pytest.raises(InputError, match=re.escape(message)):
        runpy.run_path(str(ROOT / "slurm" / "launch.py"))["main"]()
