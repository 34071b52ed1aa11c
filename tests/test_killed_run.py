"""A run that is killed with -9, twenty times, ends as if nothing had happened."""

import textwrap

import torch
from launch import PROGRAMS, environment, finish, journal, start, write_recipe
from safetensors.torch import load_file

# Forked from a process that has imported everything: twenty starts of Python would take minutes.
KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path

    import deepspeed
    import streaming.base.format

    from hmde_dist import train

    def fork(folder):
        child = os.fork()
        if child:
            os.setpgid(child, child)
            return child
        sys.argv = ["train.py", sys.argv[1], f"run.folder={folder}"]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(train.main())

    def wait(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def lines(folder):
        path = Path(folder) / "journal.jsonl"
        return path.read_text().count("\\n") if path.exists() else 0

    assert wait(fork(sys.argv[2])) == 0
    draw, kills = random.Random(11), 0
    while kills < 20:
        # After as many steps more, or before the first: so that machines of any speed are killed as often.
        goal, before = draw.randint(0, 8), lines(sys.argv[3])
        child = fork(sys.argv[3])
        time.sleep(draw.uniform(0, 0.05) if goal else draw.uniform(0, 1))
        while goal and lines(sys.argv[3]) < before + goal:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by itself"
            time.sleep(draw.uniform(0, 0.02))
        os.killpg(child, signal.SIGKILL)
        wait(child)
        kills += 1
    assert wait(fork(sys.argv[3])) == 0
    print("kills", kills)
"""


def test_a_run_killed_twenty_times_repeats_and_loses_nothing(tmp_path, shards):
    run = {"steps": 240, "log_every": 1, "checkpoint_every": 4}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards("mds"), run=run, data={"workers": 1}, optimizer={"learning_rate": 1e-4}
    )
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = finish(start([PROGRAMS / "python", script, recipe, whole, killed], environment()))
    assert job.code == 0, job.output
    assert job.output.split()[-1] == "20", job.output
    # Of a step that was done twice the later line counts.
    losses = [{record["step"]: record["loss"] for record in journal(folder)} for folder in (whole, killed)]
    assert list(losses[0]) == list(range(1, 241)) and sorted(losses[1]) == list(losses[0])
    assert losses[0] == losses[1]
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
