import json
from dataclasses import replace

import pytest
from launch import write_recipe
from test_forecast import BATCH, MODEL

from hmde_dist.engine.deepspeed_engine import BUCKET
from hmde_dist.engine.forecast import Batch
from hmde_dist.engine.memory import activation_bytes, memory_of, vector_bytes

CHUNKED = replace(BATCH, chunk_tokens=16_384)


def test_zero_divides_what_its_stage_partitions():
    small = replace(MODEL, parameters=1 << 20, trained=1 << 20, largest=1 << 18)

    def held(world: int, stage: int) -> float:
        return sum(memory_of(small, BATCH, world, stage).held.values()) / small.parameters

    # Weights and Adam's moments; under 1 and 2 a second copy of what Adam updates, under 3 also gradients and bucket.
    assert [held(1, stage) for stage in range(4)] == [12, 16, 16, 24]
    assert [held(64, stage) for stage in range(4)] == [12, 4 + 12 / 64, 4 + 12 / 64, 4 + 20 / 64]
    frozen = replace(small, trained=0, largest=0)
    assert [memory_of(frozen, BATCH, 64, stage).held["weights"] / frozen.parameters for stage in (0, 2, 3)] == [
        4,
        4,
        1 / 16,
    ]


def test_buckets_are_bounded_and_chunks_hold_whole_gradients():
    def gradients(stage: int, batch: Batch) -> int:
        return memory_of(MODEL, batch, 8, stage).phases["backward pass"]["gradients"]

    whole, bucket = 4 * MODEL.trained, 4 * BUCKET
    assert gradients(0, BATCH) == 2 * whole
    assert gradients(1, BATCH) == gradients(1, CHUNKED) == gradients(2, CHUNKED) == whole + bucket
    assert gradients(2, BATCH) == whole // 8 + 2 * bucket
    assert gradients(3, BATCH) == whole + bucket  # gathered weights, by way of a buffer
    assert gradients(3, CHUNKED) == 2 * whole + bucket


def test_a_gpu_holds_neither_the_copy_for_the_saver_nor_the_export():
    plan = memory_of(MODEL, CHUNKED, 8, 1)
    assert plan.host == 4 * (-(-3 * MODEL.trained // 8) + 2 * MODEL.parameters)
    without = sum(plan.held.values()) + max(
        sum(plan.phases[phase].values()) - plan.phases[phase].get("copy for the saver", 0)
        for phase in ("backward pass", "update", "self-test")
    )
    assert plan.device == without < sum(plan.peak.values())
    assert "self-test" not in memory_of(MODEL, CHUNKED, 8, 1, self_test=False).phases


def test_activations_are_those_of_one_chunk():
    assert CHUNKED.cached(8) and not CHUNKED.cached(1024) and not BATCH.cached(1)
    assert activation_bytes(MODEL, CHUNKED, 8) == 16_384 * 12 * 34 * 768
    assert activation_bytes(MODEL, CHUNKED, 8) == activation_bytes(MODEL, CHUNKED, 16)
    assert activation_bytes(MODEL, CHUNKED, 1024) == activation_bytes(MODEL, BATCH, 1024) == 3072 * 12 * 34 * 768
    assert activation_bytes(MODEL, BATCH, 8, bytes_each=4) == 2 * activation_bytes(MODEL, BATCH, 8)
    assert vector_bytes(MODEL, BATCH, 8) == 4 * 768 * (2 * 1024 + 2 * 8192)


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory):
    """Eighteen million parameters, in chunks, with a checkpoint before the last step."""
    folder = tmp_path_factory.mktemp("memory")
    lower = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8}
    lower |= {"intermediate_size": 3072, "max_position_embeddings": 40}
    return write_recipe(
        folder / "recipe.yaml",
        shards("mds"),
        data={"pairs_per_batch": 4},
        model={"lower": {"config": lower}, "upper": {"layers": 1, "heads": 2, "intermediate": 64}},
        engine={"chunk_tokens": 200, "self_test": False},
        run={"steps": 2, "checkpoint_every": 1, "folder": str(folder / "run")},
    )


@pytest.mark.parametrize(("ranks", "stages"), [(2, (0, 1, 2, 3)), (1, (1,))])
def test_the_plan_is_what_a_run_holds_at_most(ranks, stages, recipe, forks):
    plan = forks.train(1, recipe, "--plan", "--world", str(ranks))
    assert plan.codes == [0], plan.output
    lines = [line for line in plan.output.splitlines() if " of the first rank on a CPU" in line]
    planned = [float(line.partition(": ")[2].split()[0]) for line in lines]
    process = float(plan.output.partition(": ")[2].partition(" process")[0].split()[-1])
    for stage in stages:
        run = recipe.parent / f"{ranks}-{stage}"
        job = forks.wait(forks.start(ranks, recipe, f"run.folder={run}", f"engine.zero_stage={stage}"), 400)
        assert job.codes == [0] * ranks, job.output
        done = json.loads((run / "journal.jsonl").read_text().splitlines()[-1])
        assert done["event"] == "done"
        assert planned[stage] == pytest.approx(done["peak_gib"], rel=0.15)
        # Nor do the libraries, which are much of so small a process, hide what the model needs.
        assert planned[stage] - process == pytest.approx(done["peak_gib"] - process, rel=0.35)
