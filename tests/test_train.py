"""The command as its user meets it: launchers, wrong input, stopping, going on."""

import json
import os
import shutil
import signal
import time

import pytest
from launch import PROGRAMS, environment, finish, free_port, journal, start, torchrun, train, write_recipe


@pytest.fixture
def recipe(tmp_path, shards):
    return write_recipe(tmp_path / "recipe.yaml", shards("mds"))


def python(*arguments, **env):
    return finish(start([PROGRAMS / "python", *arguments], environment(**env)))


def test_the_deepspeed_launcher_trains_validates_and_writes_the_run_folder(tmp_path, shards):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards("mds"), data={"validation": str(shards("mds", "validation")), "workers": 1}
    )
    port = ["--master_port", free_port()]
    job = finish(start([PROGRAMS / "deepspeed", *port, "--num_gpus", 2, "hmde_dist/train.py", recipe, "run.steps=4"]))
    assert job.code == 0, job.output
    run = tmp_path / "run"
    assert {"config.yaml", "env.json", "journal.jsonl", "tensorboard", "checkpoints", "export"} <= {
        path.name for path in run.iterdir()
    }
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    promised = """step documents tokens loss learning_rate grad_norm documents_per_second tokens_per_second
        padding_fraction data_wait_fraction negatives_per_anchor""".split()
    assert all(set(promised) <= set(record) for record in steps)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["documents"] for record in steps] == [16, 32, 48, 64]
    assert steps[0]["negatives_per_anchor"] == 7
    assert all(0 <= record["padding_fraction"] < 0.2 for record in steps)
    (validation,) = [record for record in records if record.get("event") == "validation"]
    assert 0 <= validation["R@1"] <= validation["MRR@10"] <= validation["R@10"] <= 1
    assert "ETA" in job.output
    assert "1 warning" not in job.output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "validation/R@1"} <= set(board.Tags()["scalars"])
    assert board.Scalars("train/loss")[-1].value == pytest.approx(steps[-1]["loss"])


def test_plain_python_and_srun_variables_give_the_losses_of_torchrun(tmp_path, shards):
    def losses(name, job):
        assert job.code == 0, job.output
        return [record["loss"] for record in journal(tmp_path / name)]

    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    alone = losses("alone", python("hmde_dist/train.py", recipe, f"run.folder={tmp_path}/alone"))
    port = str(free_port())
    ranks = []
    for rank in (0, 1):
        slurm = {
            "SLURM_JOB_ID": port,
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
        }
        command = [PROGRAMS / "python", "hmde_dist/train.py", recipe, f"run.folder={tmp_path}/srun"]
        ranks.append(start(command, environment(**slurm)))
    second = finish(ranks[1])
    assert second.code == 0, second.output
    srun = losses("srun", finish(ranks[0]))
    torchrun_losses = losses("torchrun", train(2, recipe, f"run.folder={tmp_path}/torchrun"))
    assert srun == torchrun_losses
    assert alone == pytest.approx(srun, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.zero_stge=2"], "engine.zero_stge: no such setting; did you mean engine.zero_stage?"),
        (["data.shards=/nowhere"], "/nowhere: no shard set"),
        (["model.lower.config.num_hidden_layer=3"], "did you mean num_hidden_layers?"),
        (["run.folder=/dev/null/run"], "/dev/null is no folder that can be written to"),
        (["data.pairs_per_batch=5000"], "fewer than one batch of 5000"),
        (["run.resume=must"], "no complete checkpoint to resume from"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2_and_leaves_nothing(overrides, message, recipe, tmp_path, forks):
    job = forks.train(1, recipe, *overrides)
    assert job.codes == [2], job.output
    errors = [line for line in job.output.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_and_a_world_that_does_not_divide_the_batch_are_named(tmp_path, shards):
    folder = tmp_path / "shards"
    shutil.copytree(shards("mds"), folder)
    (folder / "shard.00000.mds").unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", folder)
    job = python("hmde_dist/train.py", recipe)
    assert job.code == 2 and "shard.00000.mds: shard file is missing" in job.output
    job = train(2, write_recipe(tmp_path / "recipe.yaml", shards("mds")), "data.pairs_per_batch=9")
    assert "data.pairs_per_batch=9 is not divisible by 2 ranks: use 1, 3, 9 ranks" in job.output
    # The first rank says it for all; on a busy machine another may not be ended in time to keep quiet.
    assert "exitcode  : 2" in job.output and job.output.count("error: ") in (1, 2)
    assert not (tmp_path / "run").exists()


def test_print_config_and_plan_start_nothing(recipe, tmp_path, forks):
    shown = forks.train(1, recipe, "--print-config", "run.steps=7")
    assert shown.codes == [0] and "steps: 7" in shown.output
    plan = forks.train(1, recipe, "--plan")
    assert plan.codes == [0] and "8 pairs, 16 documents" in plan.output
    assert not (tmp_path / "run").exists()


def stop_in_the_middle(recipe, folder, steps=40):
    """Start a run of `steps` on two ranks and stop it by SIGTERM to one of them."""
    process = start(torchrun(2, "hmde_dist/train.py", recipe, f"run.folder={folder}"))
    records = folder / "journal.jsonl"
    while process.poll() is None and not (records.exists() and len(journal(folder)) >= 3):
        time.sleep(0.05)
    os.kill(ranks_of(process.pid)[0], signal.SIGTERM)
    stopped = finish(process)
    assert "exitcode  : 75" in stopped.output, stopped.output
    assert 3 <= len(journal(folder)) < steps


def test_a_run_goes_on_with_other_ranks_and_workers_and_meets_the_same_documents(tmp_path, shards, forks):
    run = {"steps": 40, "log_every": 1}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards("mds"), run=run, engine={"zero_stage": 0}, optimizer={"learning_rate": 1e-4}
    )
    whole = forks.train(2, recipe, f"run.folder={tmp_path}/whole", "data.workers=0")
    assert whole.codes == [0, 0], whole.output
    stop_in_the_middle(recipe, tmp_path / "parts")
    resumed = forks.train(1, recipe, f"run.folder={tmp_path}/parts", "run.resume=must", "data.workers=2")
    assert resumed.codes == [0], resumed.output
    for one, other in zip(journal(tmp_path / "whole"), journal(tmp_path / "parts"), strict=True):
        assert (one["step"], one["documents"], one["tokens"]) == (other["step"], other["documents"], other["tokens"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(tmp_path, shards, forks):
    """Under a launcher, dropout on, loader workers: after SIGTERM to one rank the joined run equals the uninterrupted one."""
    settings = {"model": {"upper": {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.3}}}
    lower = write_recipe(tmp_path / "base.yaml", shards("mds"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "extends": str(lower),
                **settings,
                "run": {"steps": 40, "log_every": 1},
                "engine": {"zero_stage": 3, "zero3_persistence": 0},
                "data": {"workers": 1},
            }
        )
    )
    whole = forks.train(2, recipe, f"run.folder={tmp_path}/whole")
    assert whole.codes == [0, 0], whole.output
    stop_in_the_middle(recipe, tmp_path / "parts")
    resumed = train(2, recipe, f"run.folder={tmp_path}/parts", "run.resume=must")
    assert resumed.code == 0, resumed.output

    def facts(run):
        return [(r["step"], r["loss"], r["grad_norm"], r["tokens"], r["learning_rate"]) for r in journal(run)]

    assert facts(tmp_path / "parts") == facts(tmp_path / "whole")


def test_a_signal_to_the_whole_process_group_saves_too(tmp_path, shards):
    """Slurm signals every process of a step, loader workers among them."""
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), data={"workers": 2}, run={"steps": 5000})
    process = start([PROGRAMS / "python", "hmde_dist/train.py", recipe])
    records = tmp_path / "run" / "journal.jsonl"
    while process.poll() is None and not (records.exists() and len(journal(tmp_path / "run")) >= 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code == 75, stopped.output
    assert "Traceback" not in stopped.output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.json"))


def test_a_sample_that_one_rank_cannot_read_ends_all_with_its_message(tmp_path, shards, forks):
    folder = tmp_path / "shards"
    shutil.copytree(shards("wds"), folder)
    for tar in folder.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        for place in range(4000, len(data), 4000):
            data[place] ^= 1
        tar.write_bytes(data)
    job = forks.train(2, write_recipe(tmp_path / "recipe.yaml", folder), "run.steps=50")
    assert "is damaged (checksum does not fit)" in job.output
    assert 2 in job.codes and 0 not in job.codes and "InputError" not in job.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.pairs_per_batch=4"], "data.pairs_per_batch was 8, now 4"),
        (["engine.precision=bf16"], "engine.precision was fp32, now bf16"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(change, message, trained_run, forks):
    before = sorted(path.name for path in (trained_run / "checkpoints").iterdir())
    job = forks.train(2, trained_run / "config.yaml", "run.steps=9", *change)
    assert message in job.output and 2 in job.codes and 0 not in job.codes
    assert sorted(path.name for path in (trained_run / "checkpoints").iterdir()) == before


def test_validation_shards_of_another_sentence_length_are_refused_at_the_start(
    tmp_path, shards, tokenizer, documents_folder, forks
):
    from hmde_dist.corpus.shard_build import build_shards

    build_shards([documents_folder / "test.jsonl.gz"], tokenizer, 12, tmp_path / "other", "wds")
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), data={"validation": str(tmp_path / "other")})
    job = forks.train(1, recipe)
    assert job.codes == [2] and "differ in sentence_tokens" in job.output


def ranks_of(launcher: int) -> list[int]:
    from pathlib import Path

    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_paper_negatives_one_language_pair_and_two_sources_train_together(tmp_path, shards, forks):
    sources = [{"shards": str(shards("mds")), "weight": {0: 1.0, 4: 0.5}}, {"shards": str(shards("wds"))}]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), data={"shards": sources})
    settings = ("data.hard_negatives=paper", "data.batch_languages=one_pair", "data.window=random", "run.steps=4")
    job = forks.train(1, recipe, *settings, "engine.self_test=true")
    assert job.codes == [0], job.output
    records = journal(tmp_path / "run")
    # 8 pairs, two explicit negatives for each; the other pairs and one negative of each are an anchor's negatives.
    assert records[-1]["documents"] == 4 * 32 and records[-1]["negatives_per_anchor"] == 15
    plan = forks.train(1, recipe, *settings, "--plan")
    assert "8 pairs, 32 documents" in plan.output and "of one of 15 language pairs" in plan.output
