"""A model that was exported without any training: its vectors are made of its words, which is enough to evaluate."""

import runpy
import sys
from pathlib import Path

import pytest
from launch import ROOT, Finished, write_recipe

from hmde_dist.model.export import build_model, load_model, save_model
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.sliding_windows import SlidingWindows


def export_untrained(shards, tokenizer, folder: Path, *overrides: str, sentences: int = 16, windows=None) -> Path:
    recipe = load_recipe(write_recipe(folder / "recipe.yaml", shards("mds")), list(overrides))
    model = build_model(recipe.model, ShardIndex.open(shards("mds")), sentences, 20.0, seed=0, windows=windows)
    save_model(model, tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def model_folder(shards, tokenizer, tmp_path_factory) -> Path:
    return export_untrained(shards, tokenizer, tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def windows_folder(shards, tokenizer, tmp_path_factory) -> Path:
    """One that reads 5 windows, 110 tokens, and has no document encoder."""
    upper, folder = "model.upper={layers: 0, pooling: mean}", tmp_path_factory.mktemp("windows")
    return export_untrained(shards, tokenizer, folder, upper, sentences=5, windows=SlidingWindows(30, 20))


@pytest.fixture(scope="session")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """tools/evaluate.py as its user runs it, but in this process, which has imported everything already."""

    def run(*arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
        return Finished(ended.value.code, "".join(capsys.readouterr()))

    return run
