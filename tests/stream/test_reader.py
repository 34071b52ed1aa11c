import json
import os
import pickle
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import Group
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

CONTAINERS = ("mds", "wds")


def same(one: Group, other: Group) -> bool:
    return (one.id, one.languages) == (other.id, other.languages) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("sentence_counts", "sentence_lengths", "tokens")
    )


@pytest.fixture(scope="module")
def samples(shards) -> list[Group]:
    reader = GroupReader(ShardIndex.open(shards("wds")))
    return [reader[group] for group in range(37)]


@pytest.fixture(params=CONTAINERS)
def copy(request, shards, tmp_path):
    """A shard set that a test may damage."""
    return shutil.copytree(shards(request.param), tmp_path / "shards")


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_order_in_either_container_gives_the_same_groups(container, shards, samples):
    reader = GroupReader(ShardIndex.open(shards(container)))
    for group in np.random.default_rng(0).integers(0, 37, 100):
        assert same(reader[int(group)], samples[group])


@pytest.mark.parametrize("container", CONTAINERS)
def test_forked_processes_share_one_reader(container, shards, samples):
    reader = GroupReader(ShardIndex.open(shards(container)))
    reader[0]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        read = list(pool.map(reader.__getitem__, [*range(37), *range(36, -1, -1)], chunksize=5))
    assert all(same(got, samples[group]) for group, got in zip([*range(37), *range(36, -1, -1)], read, strict=True))


def shard_of(index: ShardIndex, group: int):
    return index.folder / index.manifest["shards"][int(index.columns["group_shard"][group])]["name"]


def test_a_flipped_byte_in_a_sample_is_named(copy):
    index = ShardIndex.open(copy)
    path = shard_of(index, 0)
    whole = path.read_bytes()
    start = whole.index(b"HMDG")
    for place in [*range(start, start + 100), start + int(index.columns["group_bytes"][0]) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: sample 0 is damaged .*restore or rebuild"):
            GroupReader(index)[0]


def test_zeros_in_place_of_a_shard_are_named(copy):
    index = ShardIndex.open(copy)
    last = index.groups - 1
    path = shard_of(index, last)
    path.write_bytes(bytes(path.stat().st_size))
    row = int(index.columns["group_row"][last])
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: sample {row} is damaged"):
        GroupReader(index)[last]


def test_shard_that_vanishes_or_shrinks_after_opening_is_named(copy):
    index = ShardIndex.open(copy)
    reader, last = GroupReader(index), index.groups - 1
    path = shard_of(index, last)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=re.escape(str(path))):
        [reader[group] for group in range(index.groups)]
    path.unlink()
    with pytest.raises(InputError, match=re.escape(str(path))):
        reader[last]


def test_flipped_bytes_of_the_mds_container_change_nothing_unseen(shards, samples, tmp_path):
    """Sample table, writer's header and the size before each sample: read by streaming, not by us."""
    index = ShardIndex.open(shutil.copytree(shards("mds"), tmp_path / "shards"))
    reader, path = GroupReader(index), shard_of(index, 0)
    whole = path.read_bytes()
    caught = 0
    for place in range(whole.index(b"HMDG")):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            try:
                assert same(reader[0], samples[0])
            except InputError as error:
                caught += 1
                assert str(error).startswith(f"{path}: sample 0 is damaged")
    assert caught > 10


def test_missing_index_of_the_mds_container_is_named(shards, tmp_path):
    folder = shutil.copytree(shards("mds"), tmp_path / "shards")
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match=re.escape(str(folder / "index.json"))):
        GroupReader(ShardIndex.open(folder))


@pytest.mark.parametrize("damage", [lambda text: text[:50], lambda text: "{}", lambda text: text.replace("mds", "xyz")])
def test_damaged_index_of_the_mds_container_is_named(shards, tmp_path, damage):
    folder = shutil.copytree(shards("mds"), tmp_path / "shards")
    (folder / "index.json").write_text(damage((folder / "index.json").read_text()))
    with pytest.raises(InputError, match=re.escape(str(folder / "index.json"))):
        GroupReader(ShardIndex.open(folder))


@pytest.mark.parametrize(("key", "value"), [("column_encodings", ["pkl"]), ("column_names", ["other"])])
def test_pickled_or_foreign_columns_are_refused(shards, tmp_path, key, value):
    folder = shutil.copytree(shards("mds"), tmp_path / "shards")
    tree = json.loads((folder / "index.json").read_text())
    tree["shards"][0][key] = value
    (folder / "index.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"index\.json: expected the one column group:bytes"):
        GroupReader(ShardIndex.open(folder))


def test_an_index_that_names_another_file_is_refused(shards, tmp_path):
    folder = shutil.copytree(shards("mds"), tmp_path / "shards")
    tree = json.loads((folder / "index.json").read_text())
    tree["shards"][0]["raw_data"]["basename"] = "../outside.mds"
    (folder / "index.json").write_text(json.dumps(tree))
    with pytest.raises(
        InputError, match=r"index\.json: missing or damaged \(\.\./outside\.mds is not in the manifest\)"
    ):
        GroupReader(ShardIndex.open(folder))


def test_a_pickle_in_place_of_a_sample_is_not_executed(copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    index = ShardIndex.open(copy)
    path, data = shard_of(index, 0), pickle.dumps(Payload())
    whole = path.read_bytes()
    start = whole.index(b"HMDG")
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])
    with pytest.raises(InputError, match=f"^{path}: sample 0 is damaged \\(not a group sample\\)"):
        GroupReader(index)[0]
    if index.manifest["container"] == "wds":  # a member of a kind that webdataset would unpickle
        name = whole.index(b"000000000.bin")
        path.write_bytes(whole[:name] + b"000000000.pkl" + path.read_bytes()[name + 13 :])
        with pytest.raises(InputError, match=f"^{path}: sample 0 is damaged"):
            GroupReader(index)[0]
    assert not (tmp_path / "executed").exists()
