import json

import pytest
from launch import journal, train, write_recipe

from hmde_dist.command import InputError
from hmde_dist.engine.checkpoint import checkpoints, load_weights, restore
from hmde_dist.recipe import load_recipe
from hmde_dist.topology import World


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints as they lie on disk, newest last."""
    for step in (1, 2, 3):
        data = tmp_path / f"step-{step:08d}"
        data.mkdir()
        (data / "weights.pt").write_bytes(b"x" * 100)
        state = {
            "step": step,
            "world": 2,
            "zero_stage": 1,
            "index_hash": "a",
            "files": {f"{data.name}/weights.pt": 100},
        }
        (tmp_path / f"{data.name}.json").write_text(json.dumps(state))
    return tmp_path


def steps(folder):
    return [int(path.stem.removeprefix("step-")) for path in checkpoints(folder)]


def test_a_checkpoint_without_manifest_or_with_a_missing_or_cut_file_does_not_count(folder):
    assert steps(folder) == [1, 2, 3]
    (folder / "step-00000003.json").unlink()
    assert steps(folder) == [1, 2]
    (folder / "step-00000002" / "weights.pt").write_bytes(b"x" * 99)
    assert steps(folder) == [1]
    (folder / "step-00000001" / "weights.pt").unlink()
    assert steps(folder) == []


@pytest.mark.parametrize(
    ("override", "identity", "world", "message"),
    [
        ("run.resume=never", {"index_hash": "a"}, 2, "set run.resume=auto"),
        ("run.resume=auto", {"index_hash": "b"}, 2, "index_hash was a, now b: set it back"),
        ("run.resume=auto", {"index_hash": "a"}, 4, "written by 2 ranks"),
        ("engine.zero_stage=2", {"index_hash": "a"}, 2, "under ZeRO 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    override, identity, world, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(World, "maximum", lambda self, value: value)  # ranks that are not there agree
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path), [override])
    with pytest.raises(InputError, match=message):
        restore(None, folder, recipe, identity, World(0, world, 0, world, "cpu"))


def test_nothing_to_resume(tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    world = World(0, 1, 0, 1, "cpu")
    assert restore(None, tmp_path / "none", load_recipe(path), {}, world) is None
    with pytest.raises(InputError, match="no complete checkpoint"):
        restore(None, tmp_path / "none", load_recipe(path, ["run.resume=must"]), {}, world)


def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one_and_old_ones_are_removed(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    settings = ["run.checkpoint_every=2", "run.keep_checkpoints=2", "optimizer.schedule=constant"]
    job = train(1, recipe, *settings, "run.steps=6")
    assert job.code == 0, job.output
    folder = tmp_path / "run" / "checkpoints"
    assert steps(folder) == [4, 6]
    assert sorted(p.name for p in folder.glob("step-*")) == [
        f"step-0000000{step}{end}" for step in (4, 6) for end in ("", ".json")
    ]
    torn = max(folder.glob("step-00000006/*"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-10])
    first = {record["step"]: record["loss"] for record in journal(tmp_path / "run")}
    again = train(1, recipe, *settings, "run.steps=6")
    assert again.code == 0, again.output
    repeated = journal(tmp_path / "run")[6:]
    assert [record["step"] for record in repeated] == [5, 6]
    assert [record["loss"] for record in repeated] == [first[5], first[6]]
    weights, state = load_weights(tmp_path / "run")
    assert state["step"] == 6 and state["documents"] == 6 * 16
    assert all(tensor.isfinite().all() for tensor in weights.values())
