"""A model that was exported without any training: its vectors are made of its words, which is enough to evaluate."""

from pathlib import Path

import pytest
from launch import write_recipe

from hmde_dist.model.export import build_model, load_model, save_model
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.index import ShardIndex


@pytest.fixture(scope="session")
def model_folder(shards, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    recipe = load_recipe(write_recipe(folder / "recipe.yaml", shards("mds")))
    model = build_model(recipe.model, ShardIndex.open(shards("mds")), 16, 20.0, seed=0)
    save_model(model, tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def model(model_folder):
    return load_model(model_folder)
