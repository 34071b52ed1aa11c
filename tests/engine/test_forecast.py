from dataclasses import replace

import pytest

from hmde_dist.engine.forecast import (
    Batch,
    Model,
    checkpoint_bytes,
    communicated_bytes,
    executed_flops,
    mfu,
    model_of,
    step_flops,
    step_time,
)

# XLM-R base below two layers of 2,048: 278 million parameters, 192 of them in an embedding table.
MODEL = Model(
    parameters=290_000_000,
    trained=290_000_000,
    largest=192_000_000,
    lower_weights=85_000_000,
    upper_weights=11_000_000,
    width=768,
    layers=12,
    intermediate=3072,
)
BATCH = Batch(documents=8192, sentences=8192 * 17, tokens=8192 * 16 * 24)


def test_the_gradient_cache_costs_a_forward_pass():
    chunked = Batch(BATCH.documents, BATCH.sentences, BATCH.tokens, chunk_tokens=16_384)
    assert step_flops(MODEL, BATCH) == 6 * (85e6 * BATCH.tokens + 11e6 * BATCH.sentences)
    assert executed_flops(MODEL, BATCH, 8) == step_flops(MODEL, BATCH)
    assert executed_flops(MODEL, chunked, 8) == pytest.approx(step_flops(MODEL, BATCH) * 4 / 3)


def test_flops_are_those_that_the_meter_counts(shards, tmp_path):
    from launch import write_recipe

    from hmde_dist.engine.deepspeed_engine import TrainedModule
    from hmde_dist.engine.meter import model_flops
    from hmde_dist.model.export import build_model
    from hmde_dist.preflight import open_mixture
    from hmde_dist.recipe import load_recipe
    from hmde_dist.stream.loader import RankBatches

    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("mds")))
    mixture = open_mixture(recipe)
    encoder = build_model(recipe.model, mixture.indexes[0], 6, 20.0, 0)
    batch = RankBatches(mixture, 0, 1, False, None)[0]
    (chunk,) = batch.chunks
    module = TrainedModule(encoder, recipe)
    model = model_of(module)
    assert model.parameters == model.trained == sum(p.numel() for p in module.parameters())
    documents = Batch(batch.documents, len(chunk.upper_rows), batch.tokens)
    assert step_flops(model, documents) == model_flops(encoder, batch) > 0
    encoder.lower.requires_grad_(False)
    upper = sum(p.numel() for p in encoder.upper.parameters())
    assert model_of(module).trained - upper == model.parameters - sum(p.numel() for p in encoder.parameters())
    assert step_flops(model_of(module), documents) == 6 * model.upper_weights * documents.sentences


def test_a_rank_alone_sends_nothing_and_stage_3_half_as_much_again():
    assert sum(communicated_bytes(MODEL, BATCH, 1, 0).values()) == 0
    sent = {stage: communicated_bytes(MODEL, BATCH, 8, stage) for stage in range(4)}
    assert sent[0] == sent[1] == sent[2]
    assert sent[0]["weights"] == 2 * 7 / 8 * 4 * MODEL.parameters
    assert sent[3]["weights"] == 1.5 * sent[0]["weights"]
    assert sent[3]["vectors"] == sent[0]["vectors"] == 2 * 7 / 8 * 4 * 768 * 8192
    chunked = Batch(BATCH.documents, BATCH.sentences, BATCH.tokens, chunk_tokens=BATCH.tokens // 16)
    # Two chunks a rank: each gathers the weights three times.
    assert communicated_bytes(MODEL, chunked, 8, 3)["weights"] == 7 * 7 / 8 * 4 * MODEL.parameters


def test_time_and_utilisation_agree_where_nothing_is_sent():
    alone = step_time(MODEL, BATCH, 1, 1, "H100", efficiency=0.4)
    assert alone.communication == 0
    assert mfu(MODEL, BATCH, 1, "H100", alone.seconds) == pytest.approx(0.4)
    many = step_time(MODEL, BATCH, 8, 1, "H100", efficiency=0.4)
    assert many.compute == pytest.approx(alone.compute / 8)
    assert many.communication == pytest.approx(sum(communicated_bytes(MODEL, BATCH, 8, 1).values()) / 450e9)
    assert mfu(MODEL, BATCH, 8, "H100", many.seconds) < 0.4


def test_a_checkpoint_has_weights_and_the_moments_of_what_is_trained():
    assert checkpoint_bytes(MODEL) == 12 * MODEL.parameters
    frozen = replace(MODEL, trained=11_000_000)
    assert checkpoint_bytes(frozen) == 4 * MODEL.parameters + 8 * 11_000_000
