"""What real DeepSpeed does on real ranks: the weights of one process with the whole batch, under every ZeRO stage."""

import pytest
import torch
from launch import journal, train, write_recipe
from safetensors.torch import load_file

from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import untrained_model

SETTINGS = {
    # An epsilon far above rounding: Adam would turn the rounding of gradients that are truly zero into full steps.
    "optimizer": {"learning_rate": 0.01, "epsilon": 1.0e-3, "gradient_clipping": 0.5},
    "objective": {"trainable_scale": True},
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("one")
    recipe = write_recipe(folder / "recipe.yaml", shards("wds"), **SETTINGS)
    job = train(1, recipe, "engine.zero_stage=0")
    assert job.code == 0, job.output
    return folder / "run"


def weights(run):
    """All weights of a run's export as one vector, and what training added to them."""
    trained = load_file(run / "export" / "model.safetensors")
    initial = untrained_model(HMDEConfig.from_pretrained(run / "export"), seed=0).state_dict()
    flat = torch.cat([trained[name].flatten() for name in sorted(trained)])
    return flat, flat - torch.cat([initial[name].flatten() for name in sorted(trained)])


def relative_error(found, expected):
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_reach_the_weights_of_one_process_with_the_whole_batch(stage, tmp_path, shards, one_process):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), **SETTINGS)
    job = train(2, recipe, f"engine.zero_stage={stage}", "engine.zero3_persistence=0")
    assert job.code == 0, job.output
    (expected, expected_update), (found, found_update) = weights(one_process), weights(tmp_path / "run")
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found_update, expected_update) < 1e-5
    for one, two in zip(journal(one_process), journal(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["scale"] == pytest.approx(one["scale"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["tokens"] == one["tokens"]
    assert journal(one_process)[-1]["scale"] != 20.0


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_follows_fp32(stage, tmp_path, shards, one_process):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), **SETTINGS)
    job = train(2, recipe, f"engine.zero_stage={stage}", "engine.precision=bf16")
    assert job.code == 0, job.output
    for one, two in zip(journal(one_process), journal(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
