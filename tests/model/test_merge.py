"""Laws of merging, and merged folders that are whole models."""

import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT
from vector_folders import small_model

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.engine import checkpoint
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.model.export import load_model
from hmde_dist.model.merge import mean, merge_models, slerp

seeds = st.integers(0, 1000)
shares = st.floats(0, 1)


def weights(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(5, 3, generator=random),
        "bias": 1e-3 * torch.randn(7, generator=random),
        "zero": torch.zeros(2),
        "places": torch.arange(4),
    }


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [small_model(tokenizer, folder / name, seed) for seed, name in enumerate("ab")]


@given(seeds, st.integers(1, 5))
def test_the_mean_of_a_model_with_itself_is_itself(seed, copies):
    one = weights(seed)
    merged = mean([one] * copies)
    assert all(torch.equal(merged[name], tensor) and merged[name].dtype == tensor.dtype for name, tensor in one.items())


@given(seeds, seeds)
def test_the_mean_lies_halfway_and_knows_no_order(seed, other):
    one, two = weights(seed), weights(other + 2000)
    merged = mean([one, two])
    assert all(torch.equal(merged[name], tensor) for name, tensor in mean([two, one]).items())
    torch.testing.assert_close(merged["matrix"], (one["matrix"] + two["matrix"]) / 2)


@given(seeds, seeds)
def test_the_ends_of_slerp_are_the_models(seed, other):
    one, two = weights(seed), weights(other)
    for share, end in ((0, one), (1, two)):
        assert all(torch.equal(tensor, end[name]) for name, tensor in slerp(one, two, share).items())


@given(seeds, seeds, shares)
def test_norms_and_angles_of_slerp_interpolate(seed, other, share):
    one, two = weights(seed), weights(other + 2000)
    for name in ("matrix", "bias"):
        a, b, found = (each[name].double().flatten() for each in (one, two, slerp(one, two, share)))
        torch.testing.assert_close(found.norm(), torch.lerp(a.norm(), b.norm(), share), rtol=1e-6, atol=1e-9)
        whole = torch.arccos(a @ b / (a.norm() * b.norm()))
        part = torch.arccos((a @ found / (a.norm() * found.norm())).clamp(-1, 1))
        assert abs(part - share * whole) < 2e-3
        # In the plane of the two.
        plane = torch.stack([a, b], dim=1)
        residual = found - plane @ torch.linalg.lstsq(plane, found[:, None]).solution[:, 0]
        assert residual.norm() < 1e-5 * found.norm()


@given(seeds, shares)
def test_alike_and_opposite_tensors_go_in_a_straight_line(seed, share):
    one = weights(seed)
    close = {name: t * (1 + 1e-6) if t.is_floating_point() else t for name, t in one.items()}
    opposite = {name: -t if t.is_floating_point() else t for name, t in one.items()}
    torch.testing.assert_close(slerp(one, close, share)["matrix"], one["matrix"], rtol=1e-5, atol=1e-8)
    straight = slerp(one, opposite, share)["matrix"]
    torch.testing.assert_close(straight, (1 - 2 * share) * one["matrix"], rtol=1e-4, atol=1e-6)


def test_what_differs_is_not_merged():
    one = weights(0)
    with pytest.raises(InputError, match="differ in the shape of bias, extra"):
        mean([one, one | {"bias": torch.zeros(3), "extra": torch.zeros(1)}])
    with pytest.raises(InputError, match="whole numbers that differ"):
        mean([one, one | {"places": torch.arange(4) + 1}])


@pytest.mark.parametrize("weight", [None, 0.25])
def test_a_merged_folder_is_a_whole_model(models, weight, small_corpus, tmp_path):
    merge_models(models, tmp_path / "out", weight)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in models[0].iterdir()}
    a, b, merged = (load_model(folder).cpu() for folder in (*models, tmp_path / "out"))
    name = "upper.layers.0.feed_forward_in.weight"
    one, two, found = (model.state_dict()[name] for model in (a, b, merged))
    between = (one + two) / 2 if weight is None else slerp({"": one}, {"": two}, weight)[""]
    torch.testing.assert_close(found, between)
    documents = list(read_documents([small_corpus]))[:5]
    vectors = np.stack(list(encode_documents(merged, documents)))
    assert np.isfinite(vectors).all() and np.abs(vectors - np.stack(list(encode_documents(a, documents)))).max() > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    how = (
        "the mean of the weights of `a`"
        if weight is None
        else "spherical interpolation, 0.25 of the way from the first"
    )
    assert "## Merged" in card and how in card and "`b` (SHA-256" in card and str(tmp_path) not in card


def test_a_model_merged_with_itself_gives_its_vectors(models, small_corpus, tmp_path):
    documents = list(read_documents([small_corpus]))[:5]
    merge_models([models[0]] * 3, tmp_path / "out")
    for before, after in zip(
        *(encode_documents(load_model(folder), documents) for folder in (models[0], tmp_path / "out")), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_models_of_another_kind_are_refused(models, tmp_path):
    shutil.copytree(models[1], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"upper_heads": 4, "scale": 30.0}))
    with pytest.raises(InputError, match=r"differ in upper_heads \(2 and 4\): only models of one architecture"):
        merge_models([models[0], tmp_path / "other"], tmp_path / "out")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "other" / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="different tokenizers"):
        merge_models([models[0], tmp_path / "other"], tmp_path / "out")
    with pytest.raises(InputError, match="no exported model"):
        merge_models([models[0], tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def merge(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "merge.py"))["main"]()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "a", "b", "--weight", "0.5"), "--weight goes with --method slerp"),
        (("--models", "a", "b", "c", "--method", "slerp"), "3 given; slerp merges two"),
        (("--models", "a"), "1 given; slerp merges two, a mean two or more"),
        (("--run", "a"), "--run needs --last K"),
        (("--run", "a", "--last", "2", "--method", "slerp"), "is a mean"),
        (("--models", "a", "b", "--last", "2"), "--last goes with --run"),
    ],
)
def test_settings_that_would_not_act_are_refused(arguments, message, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        merge(monkeypatch, *arguments, "--out", tmp_path / "out")


def test_the_last_checkpoints_of_a_run_are_averaged(forks, shards, monkeypatch, tmp_path):
    from launch import write_recipe

    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run={"steps": 4, "checkpoint_every": 1})
    job = forks.train(1, recipe, f"run.folder={tmp_path}/run", "run.keep_checkpoints=3")
    assert job.codes == [0], job.output
    merge(monkeypatch, "--run", tmp_path / "run", "--last", "3", "--out", tmp_path / "out")
    saved = [checkpoint.load_weights(tmp_path / "run", step)[0] for step in (2, 3, 4)]
    found = load_model(tmp_path / "out").cpu().state_dict()
    name = next(name for name in saved[0] if name.endswith("layers.0.feed_forward_in.weight"))
    expected = torch.stack([each[name] for each in saved]).double().mean(dim=0).float()
    assert torch.equal(found[name.removeprefix("encoder.")], expected)
    assert not torch.equal(saved[0][name], expected)
    assert "after steps 2, 3, 4" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="3 complete checkpoints, 4 wanted"):
        merge(monkeypatch, "--run", tmp_path / "run", "--last", "4", "--out", tmp_path / "more")
