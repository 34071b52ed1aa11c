"""Saves that go wrong, and checkpoints that were damaged since."""

import json
import pickle
import shutil

import pytest
import torch
from forks import Forks
from launch import journal, write_recipe
from safetensors.torch import load_file

from hmde_dist.engine import checkpoint
from hmde_dist.engine.saver import RankFile


def steps(run):
    return checkpoint.steps_in(run / "checkpoints")


def test_a_file_is_safetensors_as_its_library_reads_it(tmp_path):
    tensors = {
        "weight/0/a": torch.randn(1000),
        "buffer/0/flags": torch.tensor([True, False, True]),
        "buffer/0/count": torch.arange(5),
        "weight/7/b": torch.randn(20)[3:14],
    }
    file = RankFile(tensors)
    file.copy()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["weight/0/a"].zero_()  # the copy is of then
    facts = file.write(tmp_path / "x.safetensors", lambda: None)
    checkpoint.check_file(tmp_path / "x.safetensors", facts)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


FULL_DISK = """
import resource
inner = train.set_learning_rate
def set_learning_rate(engine, recipe, step):
    if step == 3 and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return inner(engine, recipe, step)
train.set_learning_rate = set_learning_rate
"""


def test_a_disk_that_fills_up_during_a_save_loses_nothing_that_was_complete(tmp_path, shards, forks: Forks):
    run = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run=run)
    full = forks.train(2, recipe, patch=FULL_DISK)
    assert full.codes == [1, 1], full.output
    assert "the checkpoint of step 6 could not be written; the one before it is complete" in full.output
    assert "warning: the checkpoint of step 4 failed: [Errno 27] File too large" in full.output
    assert "Traceback" not in full.output
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("event") == "checkpoint_failed"] == [4, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000002.json"]
    again = forks.train(2, recipe, "run.resume=must")
    assert again.codes == [0, 0], again.output
    assert [record["step"] for record in journal(run)] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
    assert steps(run) == [6]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, shards, forks):
    folder = tmp_path_factory.mktemp("two")
    recipe = write_recipe(folder / "recipe.yaml", shards("mds"), run={"steps": 4, "checkpoint_every": 2})
    job = forks.train(2, recipe)
    assert job.codes == [0, 0], job.output
    assert steps(folder / "run") == [2, 4]
    return folder / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Malicious:
    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (Path(self.proof),)


def pickled(path):
    """A file that would run code if anything unpickled it, in a checkpoint whose checksums are right."""
    torch.save(Malicious(path.parent.parent / "proof"), path)
    (path.parent / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Malicious(path.parent.parent / "proof")))
    manifest = path.parent.with_suffix(".json")
    facts = checkpoint.read_manifest(manifest)
    facts["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checkpoint.checksum_of(path)}
    checkpoint.write_manifest(manifest, facts)


DAMAGES = {
    "flipped byte": ("step-00000004/rank-00001.safetensors", flip, "is damaged (checksum does not fit)"),
    "cut": (
        "step-00000004/rank-00000.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "were written",
    ),
    "missing": ("step-00000004/rank-00001.safetensors", lambda path: path.unlink(), "cannot be read"),
    "manifest": ("step-00000004.json", flip, "step-00000004.json"),
    "pickle": ("step-00000004/rank-00000.safetensors", pickled, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(damage, tmp_path, two_checkpoints, forks: Forks):
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints, run)
    name, harm, message = DAMAGES[damage]
    harm(run / "checkpoints" / name)
    job = forks.train(1, run / "config.yaml", f"run.folder={run}")
    assert job.codes == [0], job.output
    assert "warning: " in job.output and message in job.output and "trying the checkpoint before it" in job.output
    assert [record["step"] for record in journal(run)] == [1, 2, 3, 4, 3, 4]
    assert not (run / "checkpoints" / "proof").exists()
    first, again = journal(run)[2:4], journal(run)[4:]
    assert [one["loss"] for one in again] == pytest.approx([one["loss"] for one in first], rel=1e-5)


def test_where_no_checkpoint_is_whole_the_run_does_not_start_anew(tmp_path, two_checkpoints, forks: Forks):
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints, run)
    for file in (run / "checkpoints").glob("step-*/rank-00000.safetensors"):
        flip(file)
    job = forks.train(1, run / "config.yaml", f"run.folder={run}")
    assert job.codes == [2] and "no checkpoint is whole" in job.output, job.output
