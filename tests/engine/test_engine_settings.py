"""Settings of the engine that must act: activation checkpointing, compiled layers, layer-wise learning rates."""

import shutil

import numpy as np
import pytest
import torch
from launch import PROGRAMS, environment, finish, journal, start, write_recipe

from hmde_dist.engine.deepspeed_engine import TrainedModule, parameter_groups
from hmde_dist.model.export import build_model
from hmde_dist.model.packed_attention import encoder_layers
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex


def model_of(tmp_path, shards, *overrides):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("wds")), list(overrides))
    return recipe, build_model(recipe.model, ShardIndex.open(shards("wds")), recipe.data.sentences, 20.0, 0)


def batch_of(documents=6):
    random = np.random.default_rng(0)
    lengths = [random.integers(1, 20, 4) for _ in range(documents)]
    tokens = [random.integers(10, 500, n.sum()).astype(np.uint32) for n in lengths]
    return pack(list(zip(tokens, lengths, strict=True)), cls_id=1, sep_id=2, sentences=6)


def test_checkpointed_layers_run_twice_with_the_same_gradients_and_dropout(tmp_path, shards):
    dropout = "model.lower.config.hidden_dropout_prob=0.2", "model.upper.dropout=0.2"
    gradients, calls = [], []
    for checkpointed in (False, True):
        _, model = model_of(tmp_path, shards, *dropout)
        if checkpointed:
            model.checkpoint_activations()
        count = [0]
        for layer in (*encoder_layers(model.lower), *model.upper.layers):
            attention = layer.attention.self if hasattr(layer, "attention") else layer.attention_out
            attention.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        torch.manual_seed(5)
        model.train()(batch_of()).documents.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(count[0])
    assert calls == [2, 4]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_activation_checkpointing_trains_as_without(tmp_path, shards, forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    losses = []
    for setting in ("false", "true"):
        arguments = (
            f"engine.activation_checkpointing={setting}",
            f"run.folder={tmp_path}/{setting}",
            "engine.zero_stage=2",
        )
        job = forks.train(1, recipe, *arguments)
        assert job.codes == [0], job.output
        losses.append([record["loss"] for record in journal(tmp_path / setting)])
    assert losses[0] == losses[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_train_as_without(tmp_path, shards, forks):
    # An epsilon far above rounding, which Adam would turn into full steps.
    optimizer = {"learning_rate": 0.01, "epsilon": 1e-3, "schedule": "constant"}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), optimizer=optimizer)
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), TORCH_LOGS="recompiles")
    plain = forks.train(1, recipe, f"run.folder={tmp_path}/plain")
    assert plain.codes == [0], plain.output
    arguments = ("engine.compile=true", f"run.folder={tmp_path}/compiled", "run.steps=6")
    refused = forks.train(1, recipe, *arguments)
    assert refused.codes == [2] and "TORCHDYNAMO_DISABLE=1 is set" in refused.output
    del env["TORCHDYNAMO_DISABLE"]
    compiled = finish(start([PROGRAMS / "python", "hmde_dist/train.py", recipe, *arguments], env), 400)
    assert compiled.code == 0, compiled.output
    assert list((tmp_path / "inductor").rglob("*.cpp"))  # code was generated
    for one, other in zip(journal(tmp_path / "plain"), journal(tmp_path / "compiled"), strict=False):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_layers_nearer_to_the_words_learn_more_slowly(tmp_path, shards):
    recipe, model = model_of(
        tmp_path,
        shards,
        "optimizer.layer_decay=0.5",
        "model.lower.config.num_hidden_layers=2",
        "optimizer.weight_decay=0.1",
        "objectives=[{name: document_contrast, trainable_scale: true}]",
    )
    module = TrainedModule(model, recipe)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in parameter_groups(module, recipe) for p in g["params"]}
    assert len(scale) == len(list(module.parameters()))
    layers = model.lower.encoder.layer
    assert scale[id(model.lower.embeddings.word_embeddings.weight)] == (0.125, 0.1)
    assert scale[id(layers[0].output.dense.weight)] == (0.25, 0.1)
    assert scale[id(layers[1].output.dense.bias)] == (0.5, 0.0)
    assert scale[id(model.upper.dcls)] == scale[id(module.objectives[0].log_scale_change)] == (1.0, 0.0)
