import re
import runpy
import sys

import pytest
from launch import PROGRAMS, ROOT, environment, finish, journal, start, write_recipe

from hmde_dist.command import InputError
from hmde_dist.corpus import shard_build
from hmde_dist.submission import Profile, batch_script, load_profile


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
        cluster="slurm", tasks_per_node=4, gpus_per_node=4, time_minutes=90, account="me", setup=["module load x"]
    )
    script = batch_script(profile, 3, "name", tmp_path)
    for line in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "account=me", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1" in script and "module load x" in script and "partition" not in script


def test_dry_run_submits_nothing(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    job = launch(recipe, "--profile", "gpu", "--nodes", "2", "--dry-run", "run.steps=77", "data.pairs_per_batch=16")
    assert job.code == 0, job.output
    assert "#SBATCH --nodes=2" in job.output and "steps: 77" in job.output
    assert not (tmp_path / "run").exists()


def test_wrong_profiles_are_named(tmp_path):
    with pytest.raises(InputError, match="there are: none"):
        load_profile(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("cluster: slurm\ntasks: 3\n")
    with pytest.raises(InputError, match=r"tasks_per_node: Field required; tasks: Extra"):
        load_profile(tmp_path / "bad.yaml")


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--array", "2"), "give RECIPE, or --array N -- COMMAND"),
        (("recipe.yaml", "--array", "2", "--", "tools/build_shards.py"), "give RECIPE, or --array N -- COMMAND"),
        (("--array", "2", "--", "tools/encode.py", "--out", "x"), "only tools/build_documents.py wikipedia and"),
        (("--array", "2", "--", "tools/build_shards.py"), "needs one --out"),
        ((), "give RECIPE"),
        (("--array", "2", "--", "tools/build_shards.py", "--out", "x", "--workers", "3"), "--workers: set by the jobs"),
    ],
)
def test_what_cannot_be_an_array_is_said(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--profile", "cpu", *arguments])
    with pytest.raises(InputError, match=re.escape(message)):
        runpy.run_path(str(ROOT / "slurm" / "launch.py"))["main"]()
