import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from launch import write_documents

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.shard_build import build_shards
from hmde_dist.corpus.shards import COLUMNS
from hmde_dist.stream.index import ShardIndex

CONTAINERS = ("mds", "wds")


@pytest.fixture(params=CONTAINERS)
def copy(request, shards, tmp_path):
    """A shard set that a test may damage."""
    return shutil.copytree(shards(request.param, "validation"), tmp_path / "shards")


@pytest.mark.parametrize("container", CONTAINERS)
def test_opened_index_says_what_is_there(container, shards):
    index = ShardIndex.open(str(shards(container, "validation")))
    assert (index.groups, index.languages) == (4, ["ar", "en", "hi", "ja", "ru", "zh-cn"])
    assert set(index.columns) == set(COLUMNS)
    assert len(index.columns["group_bytes"]) == index.groups


def test_no_shard_is_read_to_open_the_index(copy):
    """Overwritten bytes of the right number go unseen here; the reader refuses them."""
    for entry in json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["shards"]:
        (copy / entry["name"]).write_bytes(bytes(entry["bytes"]))
    assert ShardIndex.open(copy).groups == 4


def files_of(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shards = [folder / entry["name"] for entry in manifest["shards"]]
    return [*shards, *(folder / "columns" / f"{name}.npy" for name in COLUMNS)]


def test_missing_file_is_named(copy):
    for path in files_of(copy):
        path.rename(copy / "away")
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: shard file is missing; restore it or rebuild"):
            ShardIndex.open(copy)
        (copy / "away").rename(path)
    ShardIndex.open(copy)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"\0"])
def test_file_of_another_size_is_named(copy, change):
    for path in files_of(copy):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        message = f"{path}: {len(change(whole))} bytes, the manifest says {len(whole)}: damaged or half-copied"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            ShardIndex.open(copy)
        path.write_bytes(whole)


def test_folder_without_manifest_is_no_shard_set(copy):
    (copy / "manifest.json").unlink()
    for folder in (copy, copy / "nowhere", copy / "columns" / "group_row.npy"):
        with pytest.raises(InputError, match=f"^{re.escape(str(folder))}: no shard set .*tools/build_shards.py"):
            ShardIndex.open(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: '{"layout": 1}'],
    ids=["half", "empty", "list", "no shards"],
)
def test_damaged_manifest_is_named(copy, damage):
    path = copy / "manifest.json"
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(str(copy))):
        ShardIndex.open(copy)


@pytest.mark.parametrize("key", ["shards", "columns", "tokenizer_files"])
def test_a_name_that_leads_out_of_the_folder_is_refused(copy, key):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in ("../../escaped", "a/b.npy", "/etc/passwd", "..", ".hidden", "", "a\nb", "a\n", 7, None):
        manifest[key][0]["name"] = name
        path.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(InputError, match=rf"^{path}: damaged or not ours \(names of its files\)"):
            ShardIndex.open(copy)


@pytest.mark.parametrize("change", [{"sha256": None}, {"bytes": "7"}, []])
def test_a_file_without_fingerprint_is_refused(copy, change):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["shards"][0] = manifest["shards"][0] | change if change else change
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match=f"^{path}: damaged or not ours"):
        ShardIndex.open(copy)


def test_a_pickle_in_place_of_a_column_is_not_loaded(copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.save(tmp_path / "objects.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    for data in ((tmp_path / "objects.npy").read_bytes(), pickle.dumps(Payload())):
        (copy / "columns" / "group_row.npy").write_bytes(data)
        (entry,) = [entry for entry in manifest["columns"] if entry["name"] == "group_row.npy"]
        entry["bytes"] = len(data)
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(InputError, match=f"^{copy}: a column is missing or damaged"):
            ShardIndex.open(copy)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", [0, 1, None])
def test_other_layout_is_refused(copy, layout):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"layout": layout}), encoding="utf-8")
    with pytest.raises(InputError, match=f"shard layout {layout}, this version reads 2: rebuild"):
        ShardIndex.open(copy)


@pytest.mark.parametrize("container", CONTAINERS)
def test_hash_follows_the_content(container, documents_folder, tokenizer, tmp_path):
    def build(name, documents, budget=24):
        path = write_documents(tmp_path / f"{name}.jsonl", documents)
        build_shards([path], tokenizer, budget, tmp_path / name, container)
        return ShardIndex.open(tmp_path / name).hash

    documents = list(read_documents([documents_folder / "validation.jsonl.gz"]))
    same = build("same", documents)
    assert build("moved", documents[::-1]) == same
    first = documents[0]
    changed = Document(first.id, first.lang, first.title, first.text + " bee", (), first.categories)
    sentences = tuple(split_sentences(first.text, first.lang))
    reordered = Document(first.id, first.lang, first.title, "", sentences[::-1], first.categories)
    recategorised = [Document(d.id, d.lang, d.title, d.text, (), ("all",)) for d in documents]
    others = [
        build("text", [changed, *documents[1:]]),
        build("order", [reordered, *documents[1:]]),
        build("category", recategorised),
        build("fewer", documents[1:]),
        build("budget", documents, budget=23),
    ]
    assert len({same, *others}) == 6


def test_columns_are_not_loaded_into_memory(copy):
    assert all(isinstance(column, np.memmap) for column in ShardIndex.open(copy).columns.values())
