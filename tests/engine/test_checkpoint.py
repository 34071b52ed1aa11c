import json

import pytest
import torch
from launch import write_recipe

from hmde_dist.command import InputError
from hmde_dist.engine import checkpoint
from hmde_dist.engine.checkpoint import find, load_weights, outdated, steps_in, sweep, write_manifest
from hmde_dist.recipe import load_recipe
from hmde_dist.topology import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints as they lie on disk, an hour apart."""
    for step in (1, 2, 3):
        data = tmp_path / "checkpoints" / f"step-{step:08d}"
        data.mkdir(parents=True)
        manifest = {
            "state": {"step": step, "batch": step},
            "identity": {"index_hash": "a"},
            "time": step * 3600.0,
            "files": {},
            "parameters": {},
            "buffers": {},
        }
        write_manifest(data.with_suffix(".json"), manifest)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("override", "identity", "message"),
    [
        ("run.resume=never", {"index_hash": "a"}, "set run.resume=auto"),
        ("run.resume=auto", {"index_hash": "b"}, "index_hash was a, now b: set it back"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(override, identity, message, folder, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path), [override])
    with pytest.raises(InputError, match=message):
        find(folder, recipe, identity, ALONE)


def test_nothing_to_resume(tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    assert find(tmp_path / "none", load_recipe(path), {}, ALONE) is None
    with pytest.raises(InputError, match="no complete checkpoint"):
        find(tmp_path / "none", load_recipe(path, ["run.resume=must"]), {}, ALONE)
    with pytest.raises(InputError, match="no complete checkpoint to export"):
        load_weights(tmp_path)


def test_checkpoints_of_another_format_are_refused_and_not_taken_for_damaged(folder, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path))
    old = {"step": 4, "world": 2, "zero_stage": 1, "files": {}}
    (folder / "step-00000004.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="earlier version"):
        find(folder, recipe, {}, ALONE)
    checkpoint.FORMAT, known = 9, checkpoint.FORMAT
    write_manifest(folder / "step-00000004.json", {})
    checkpoint.FORMAT = known
    with pytest.raises(InputError, match="format 9, this version reads"):
        find(folder, recipe, {}, ALONE)


def test_the_newest_the_pinned_and_one_of_every_so_many_hours_stay(folder):
    assert outdated(folder, 2, None) == [1]
    assert outdated(folder, 1, None) == [1, 2]
    assert outdated(folder, 1, 2) == [2]
    assert outdated(folder, 1, 0.5) == []
    (folder / "step-00000002.pinned").touch()
    assert outdated(folder, 1, None) == [1]


def test_after_a_rollback_what_is_pinned_is_set_aside_and_the_rest_goes(folder):
    (folder / "step-00000002.pinned").touch()
    whole = {path.name: path.read_bytes() for path in (folder / "step-00000002").iterdir()}
    checkpoint.remove_after(folder, 1)
    assert steps_in(folder) == [1] and not (folder / "step-00000003").exists()
    aside = folder / "abandoned-1-step-00000002"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == whole
    assert aside.with_suffix(".json").exists() and aside.with_suffix(".pinned").exists()
    sweep(folder)
    assert aside.exists()


def test_what_a_killed_save_left_is_swept_and_nothing_else(folder):
    (folder / ".step-00000004.partial").mkdir()
    (folder / ".step-00000004.partial" / "rank-00000.safetensors").touch()
    (folder / ".step-00000003.json.partial-77").touch()
    (folder / "step-00000005").mkdir()
    before = sorted(path.name for path in folder.glob("step-0000000[123]*"))
    sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    checkpoint.remove(folder, 2)
    assert steps_in(folder) == [1, 3] and not (folder / "step-00000002").exists()
