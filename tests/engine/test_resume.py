"""Going on: bit for bit on the same ranks, and with the same batches and losses on others, under every ZeRO stage."""

import json

import pytest
from launch import journal, write_recipe

STAGES = [0, 1, 2, 3]


def zero(stage):
    # ZeRO-3 partitions nothing as small as this unless it is told to.
    return {"zero_stage": stage} | ({"zero3_persistence": 0} if stage == 3 else {})


def facts(run):
    """The steps of a run; of a step that was done twice the later line counts."""
    named = ("loss", "grad_norm", "tokens", "learning_rate", "batch")
    return {record["step"]: [record[name] for name in named] for record in journal(run)}


def checksums(run, step):
    """Of the files of a checkpoint: alike only if weights and moments are, bit for bit."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


DROPOUT = {
    "lower": {
        "config": {
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 40,
        }
    },
    "upper": {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.1},
}


# A bank and running statistics beside weights and moments.
WITH_STATE = [
    {"name": "document_contrast", "trainable_scale": True},
    {"name": "context_prediction", "norm": "batch", "bank": 6},
]


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stage, tmp_path, shards, forks):
    """With dropout, a chunked batch, a trained scale and warm-up; stopped by the STOP file."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        model=DROPOUT,
        objectives=WITH_STATE,
        optimizer={"warmup_steps": 3},
        engine=zero(stage) | {"chunk_tokens": 200},
        run={"steps": 8, "log_every": 1},
    )
    whole = forks.train(2, recipe, f"run.folder={tmp_path}/whole")
    assert whole.codes == [0, 0], whole.output
    parts = tmp_path / "parts"
    stop = f"""
from pathlib import Path
inner = train.set_learning_rate
def set_learning_rate(engine, recipe, step):
    if step == 4 and rank == 0:
        Path({str(parts)!r}, "STOP").touch()
    return inner(engine, recipe, step)
train.set_learning_rate = set_learning_rate
"""
    stopped = forks.train(2, recipe, f"run.folder={parts}", patch=stop)
    assert stopped.codes == [75, 75], stopped.output
    assert sorted(facts(parts)) == [1, 2, 3, 4, 5] and not (parts / "STOP").exists()
    resumed = forks.train(2, recipe, f"run.folder={parts}", "run.resume=must")
    assert resumed.codes == [0, 0], resumed.output
    assert facts(parts) == facts(tmp_path / "whole")
    assert checksums(parts, 8) == checksums(tmp_path / "whole", 8)


@pytest.mark.parametrize(("first", "then"), [((2, 1), (1, 3)), ((1, 3), (2, 0)), ((2, 2), (4, 1)), ((2, 0), (4, 3))])
def test_a_run_goes_on_with_other_ranks_and_another_stage(first, then, tmp_path, shards, forks):
    """(ranks, ZeRO stage) before and after; the same batches, and losses that differ by the order of sums alone."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        objectives=WITH_STATE,
        optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        run={"steps": 4, "log_every": 1},
    )

    def train(stand, steps):
        ranks, stage = stand
        settings = [f"engine.{name}={value}" for name, value in zero(stage).items()]
        job = forks.train(ranks, recipe, *settings, f"run.steps={steps}", f"run.folder={tmp_path}/run")
        assert job.codes == [0] * ranks, job.output

    whole = forks.train(2, recipe, "engine.zero_stage=0", f"run.folder={tmp_path}/whole", "run.steps=8")
    assert whole.codes == [0, 0], whole.output
    train(first, 4)
    train(then, 8)
    one, other = facts(tmp_path / "whole"), facts(tmp_path / "run")
    assert sorted(other) == list(range(1, 9))
    for step in one:
        assert other[step][2:] == one[step][2:]
        assert other[step][0] == pytest.approx(one[step][0], rel=1e-6)
