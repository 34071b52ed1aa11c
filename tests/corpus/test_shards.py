import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstd
from hypothesis import given
from hypothesis import strategies as st
from launch import write_documents

from hmde_dist.command import InputError
from hmde_dist.corpus import buckets
from hmde_dist.corpus import shard_build as module
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.shard_build import STEPS, build_shards, choose_clusters
from hmde_dist.corpus.shards import COLUMNS, NO_CLUSTER, decode_group, encode_group
from hmde_dist.corpus.steps import ShareDone
from hmde_dist.corpus.text import SentenceTokenizer
from hmde_dist.corpus.tokenizer import load_tokenizer, train_tokenizer
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

CONTAINERS = ("mds", "wds")
BUDGET = 24
SECOND_LEVEL = "animals astronomy city computing food health history machines music plants sport weather".split()

pieces_strategy = st.lists(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6).map(lambda ids: np.array(ids, dtype=np.uint32)),
    max_size=4,
)
groups_strategy = st.dictionaries(st.sampled_from(["en", "zh-cn", "pt-br", "ar"]), pieces_strategy).filter(
    lambda documents: any(documents.values())
)
ids_strategy = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def flat(pieces) -> list[int]:
    return [int(token) for piece in pieces for token in piece]


@given(ids_strategy, groups_strategy)
def test_a_group_survives_its_bytes(id_, documents):
    group = decode_group(encode_group(id_, documents))
    assert (group.id, group.languages) == (id_, list(documents))
    assert group.sentence_counts.tolist() == [len(pieces) for pieces in documents.values()]
    for number, pieces in enumerate(documents.values()):
        tokens, lengths = group.document(number)
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == flat(pieces)
        assert lengths.tolist() == [len(piece) for piece in pieces]


@given(ids_strategy, groups_strategy, st.data())
def test_cut_bytes_are_refused(id_, documents, data):
    whole = encode_group(id_, documents)
    with pytest.raises(ValueError):
        decode_group(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError):
        decode_group(whole + b"\0")


def test_a_flipped_bit_anywhere_is_refused():
    whole = encode_group("bee", {"en": [np.arange(3, dtype=np.uint32)], "ja": [np.arange(5, dtype=np.uint32)] * 2})
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError):
                decode_group(bytes(damaged))


def test_bytes_of_a_group_never_change():
    """The layout is written to disks: another one needs another LAYOUT_VERSION."""
    data = encode_group("é", {"en": [np.array([1, 2**32 - 1], dtype=np.uint32)], "ja": []})
    header = '{"id": "é", "languages": ["en", "ja"], "sentence_counts": [1, 0]}'.encode()
    body = bytes([len(header), 0, 0, 0]) + header + b"\x02\x00" + b"\x01\0\0\0" + b"\xff" * 4
    assert data[:8] == b"HMDG" + zlib.crc32(data[8:]).to_bytes(4, "little")
    assert zstd.decompress(data[8:]) == body


@pytest.fixture(scope="module", params=CONTAINERS)
def index(request, shards) -> ShardIndex:
    return ShardIndex.open(shards(request.param))


@pytest.fixture(scope="module")
def expected(documents_folder, tokenizer) -> dict[str, dict[str, list[np.ndarray]]]:
    """Token pieces by id and language, straight from the documents."""
    encoder = SentenceTokenizer(tokenizer, BUDGET)
    pieces: dict[str, dict[str, list[np.ndarray]]] = {}
    documents = read_documents([documents_folder / "train.jsonl.gz"])
    for d in sorted(documents, key=lambda d: (d.id, d.lang)):
        pieces.setdefault(d.id, {})[d.lang] = encoder.encode([split_sentences(d.text, d.lang)])[0]
    return pieces


def test_shards_hold_every_token_of_every_document(index, expected):
    reader = GroupReader(index)
    assert len(index.manifest["shards"]) > 2, "several shards, or the test shows little"
    samples = [reader[group] for group in range(index.groups)]
    assert sorted(sample.id for sample in samples) == list(expected)
    for sample in samples:
        assert sample.languages == list(expected[sample.id])
        for number, pieces in enumerate(expected[sample.id].values()):
            tokens, lengths = sample.document(number)
            assert tokens.tolist() == flat(pieces)
            assert lengths.tolist() == [len(piece) for piece in pieces]


def test_columns_agree_with_the_samples(index):
    columns, reader = index.columns, GroupReader(index)
    assert {name: column.dtype for name, column in columns.items()} == {n: np.dtype(t) for n, t in COLUMNS.items()}
    assert columns["group_documents"][0] == 0
    assert columns["group_documents"][-1] == index.manifest["documents"] == len(columns["document_language"])
    for group in range(index.groups):
        sample = reader[group]
        mine = slice(*columns["group_documents"][group : group + 2])
        assert [index.languages[n] for n in columns["document_language"][mine]] == sample.languages
        assert columns["document_sentences"][mine].tolist() == sample.sentence_counts.tolist()
        assert columns["document_tokens"][mine].tolist() == [
            len(sample.document(number)[0]) for number in range(len(sample.languages))
        ]
        # The second of its two categories, which is the smaller one.
        assert index.manifest["clusters"][columns["group_cluster"][group]] in SECOND_LEVEL
    assert columns["group_categories"][-1] == len(columns["category"])
    assert set(np.diff(columns["group_categories"].astype(int))) <= {1, 2}


def test_manifest_counts_and_fingerprints(index, tokenizer, expected):
    manifest = index.manifest
    assert manifest["groups"] == 37
    assert manifest["sentences"] == index.columns["document_sentences"].sum()
    assert manifest["tokens"] == index.columns["document_tokens"].sum()
    assert manifest["languages"] == ["ar", "en", "hi", "ja", "ru", "zh-cn"]
    assert manifest["special_ids"] == {
        "cls": tokenizer.cls_token_id,
        "sep": tokenizer.sep_token_id,
        "pad": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
    }
    assert manifest["vocabulary"] == len(tokenizer)
    assert manifest["sentence_tokens"] == BUDGET
    assert manifest["dropped"] == {"documents_without_tokens": 0}
    for entry in manifest["shards"]:
        data = (index.folder / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_groups_lie_in_order_of_category(index):
    clusters = index.columns["group_cluster"].tolist()
    assert clusters == sorted(clusters) and len(set(clusters)) > 5
    assert index.manifest["clusters"] == sorted(index.manifest["clusters"])


def test_tokenizer_lies_beside_the_shards(index, tokenizer):
    assert load_tokenizer(index.folder / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_streaming_reads_the_mds_folder(shards):
    from streaming import LocalDataset

    index = ShardIndex.open(shards("mds"))
    dataset = LocalDataset(local=str(index.folder))
    assert len(dataset) == index.groups
    assert [len(dataset[group]["group"]) for group in range(index.groups)] == index.columns["group_bytes"].tolist()
    assert decode_group(dataset[index.groups - 1]["group"]).id == GroupReader(index)[index.groups - 1].id


def test_webdataset_reads_the_tar_files(shards):
    from webdataset import WebDataset

    index = ShardIndex.open(shards("wds"))
    urls = [str(index.folder / entry["name"]) for entry in index.manifest["shards"]]
    samples = list(WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{group:09d}" for group in range(index.groups)]
    reader = GroupReader(index)
    assert [decode_group(sample["bin"]).id for sample in samples] == [reader[g].id for g in range(index.groups)]


def test_columns_locate_every_tar_member(shards):
    index = ShardIndex.open(shards("wds"))
    found = []
    for number, entry in enumerate(index.manifest["shards"]):
        with tarfile.open(index.folder / entry["name"], "r:") as tar:
            found += [(number, row, m.offset_data, m.size) for row, m in enumerate(tar)]
    names = ("group_shard", "group_row", "group_offset", "group_bytes")
    assert found == list(zip(*(index.columns[name].tolist() for name in names), strict=True))


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_documents_give_equal_files(container, shards, documents_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 15)
    documents = list(read_documents([documents_folder / "train.jsonl.gz"]))
    half = len(documents) // 2
    paths = [
        write_documents(tmp_path / f"{n}.jsonl", part)
        for n, part in enumerate([documents[:half:-1], documents[: half + 1]])
    ]
    build_shards(paths, tokenizer, BUDGET, tmp_path / "again", container)
    assert_same_set(tmp_path / "again", shards(container))


def assert_same_set(one, other):
    """Equal files, but for the sources that the manifest names."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names - {Path("manifest.json")}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (one, other)]
    assert manifests[0] | {"sources": []} == manifests[1] | {"sources": []}


@pytest.fixture
def many(monkeypatch, tmp_path) -> Path:
    """Documents that make several buckets and shards."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1 << 14)
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 13)
    draw = random.Random(0)
    documents = [
        Document(f"Q{n}", lang, text=" ".join(draw.choices(WORDS, k=40)) + ".", categories=(f"c{n % 9}", f"d{n % 50}"))
        for n in range(300)
        for lang in draw.sample(["de", "en", "ja", "ru"], draw.randint(1, 4))
    ]
    return write_documents(tmp_path / "many.jsonl", documents)


WORDS = "bees make honey from nectar of flowers and one queen lays all eggs while workers clean cells".split()


@pytest.mark.parametrize("container", CONTAINERS)
def test_processes_and_shares_do_not_reach_the_files(container, many, tokenizer, tmp_path):
    manifest = build_shards([many], tokenizer, BUDGET, tmp_path / "one", container, workers=1)
    assert len(manifest["shards"]) > 3 and manifest["groups"] == 300
    build_shards([many], tokenizer, BUDGET, tmp_path / "four", container, workers=4)
    for step, is_many in STEPS.items():
        for share in range(3 if is_many else 1):
            with contextlib.nullcontext() if step == "finish" else pytest.raises(ShareDone):
                of = (share, 3) if is_many else (0, 1)
                build_shards([many], tokenizer, BUDGET, tmp_path / "jobs", container, 1, step, of)
    for other in ("four", "jobs"):
        assert_same_set(tmp_path / "one", tmp_path / other)
        assert (tmp_path / other / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(many, tokenizer, tmp_path):
    def start(out):
        job = multiprocessing.get_context("fork").Process(target=build, args=(out,))
        job.start()
        return job

    def build(out):
        os.setsid()
        build_shards([many], tokenizer, BUDGET, out, "mds", workers=2)

    began = time.monotonic()
    job = start(tmp_path / "whole")
    job.join()
    seconds = time.monotonic() - began
    assert job.exitcode == 0
    draw, killed = random.Random(7), 0
    for _ in range(10):
        job = start(tmp_path / "out")
        job.join(draw.uniform(0.05, 0.8) * seconds)
        if job.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # before it has a group of its own
                os.killpg(job.pid, signal.SIGKILL)
            job.kill()
            killed += 1
        job.join()
        if (tmp_path / "out").exists():
            assert_same_set(tmp_path / "whole", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert killed > 3
    job = start(tmp_path / "out")
    job.join()
    assert job.exitcode == 0
    assert_same_set(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_cluster_is_the_smallest_category_that_is_shared():
    lists = [
        ["writer", "writer/guide"],
        ["writer", "writer/guide"],
        ["writer", "writer/index"],
        ["physicists", "1900 births", "own"],
        ["1900 births", "chemists"],
        ["alone"],
        [],
    ]
    names = [name for of_group in lists for name in of_group]
    numbers = np.array([sorted(set(names)).index(name) for name in names], dtype=np.uint64)
    place = choose_clusters(numbers, np.array([len(of_group) for of_group in lists]))
    chosen = [names[p] if p >= 0 else "" for p in place]
    assert chosen == ["writer/guide", "writer/guide", "writer", "1900 births", "1900 births", "", ""]


def test_of_categories_of_one_size_the_last_is_the_most_specific():
    assert choose_clusters(np.array([7, 3, 7, 3], dtype=np.uint64), np.array([2, 2])).tolist() == [1, 3]
    assert choose_clusters(np.array([], dtype=np.uint64), np.array([0, 0])).tolist() == [-1, -1]


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_dropped_and_cut_is_counted(container, tokenizer, tmp_path):
    documents = [
        Document("a", "en", text="..."),
        Document("a", "de", sentences=("Two bees.", "bee " * 30)),
        Document("a", "fr", text="Two bees. Three bees."),
        Document("b", "en", text="!"),
    ]
    manifest = build_shards(
        [write_documents(tmp_path / "a.jsonl", documents)], tokenizer, 10, tmp_path / "out", container
    )
    assert manifest["dropped"] == {"documents_without_tokens": 2}
    assert (manifest["groups"], manifest["documents"], manifest["clusters"]) == (1, 2, [""])
    long = len(tokenizer("bee " * 30, add_special_tokens=False)["input_ids"])
    assert manifest["long_sentences_cut"] == -(-long // 10) - 1
    reader = GroupReader(ShardIndex.open(tmp_path / "out"))
    assert reader[0].sentence_counts.tolist() == [1 + -(-long // 10), 2]
    assert reader[0].languages == ["de", "fr"]


def test_category_named_by_no_group_is_no_cluster(tokenizer, tmp_path):
    documents = [
        Document(id_, lang, text="Two bees.", categories=categories)
        for id_, categories in [("a", ()), ("b", ("x",)), ("c", ("x", "y"))]
        for lang in ("de", "en")
    ]
    manifest = build_shards([write_documents(tmp_path / "a.jsonl", documents)], tokenizer, 10, tmp_path / "out", "wds")
    assert manifest["clusters"] == ["", "x"]
    assert ShardIndex.open(tmp_path / "out").columns["group_cluster"].tolist() == [NO_CLUSTER, 1, 1]


def test_a_group_larger_than_a_shard_has_one_of_its_own(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 200)
    texts = ["Two bees. " * n for n in (1, 400, 1, 400)]
    documents = [Document(f"a{n}", "en", text=text) for n, text in enumerate(texts)]
    manifest = build_shards([write_documents(tmp_path / "a.jsonl", documents)], tokenizer, 10, tmp_path / "out", "mds")
    reader = GroupReader(ShardIndex.open(tmp_path / "out"))
    assert sorted(reader[n].id for n in range(4)) == ["a0", "a1", "a2", "a3"] and len(manifest["shards"]) >= 2


def test_an_out_that_is_a_link_or_was_built_before_is_no_trap(tokenizer, tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [Document("a", lang, text="Two bees.") for lang in ("de", "en")])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    first = build_shards([path], tokenizer, 10, tmp_path / "link", "wds")
    assert ShardIndex.open(tmp_path / "link").groups == 1
    shutil.rmtree(tmp_path / "real")
    # Another tokenizer at the same place is not mistaken for the one before.
    other = train_tokenizer([Document("a", "en", text="bees two honey make " * 9)], 30, tmp_path / "tokenizer")
    second = build_shards([path], other, 10, tmp_path / "real", "wds")
    ids = GroupReader(ShardIndex.open(tmp_path / "real"))[0].tokens
    assert first["vocabulary"] != second["vocabulary"] and ids.max() < second["vocabulary"]


def test_failed_shards_leave_no_shard_set(tokenizer, tmp_path, monkeypatch):
    def full(id_, kept):
        raise OSError("disk full")

    path = write_documents(tmp_path / "a.jsonl", [Document("a", lang, text="Two bees.") for lang in ("de", "en")])
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_group", full)
        with pytest.raises(OSError, match="disk full"):
            build_shards([path], tokenizer, 10, tmp_path / "out", "wds")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="unfinished build with other sentence_tokens"):
        build_shards([path], tokenizer, 11, tmp_path / "out", "wds")
    assert build_shards([path], tokenizer, 10, tmp_path / "out", "wds")["groups"] == 1


@pytest.mark.parametrize(
    ("documents", "budget", "message"),
    [
        ([], 10, "no document"),
        ([Document("a", "en", text="...")], 10, "no document has any token"),
        ([Document("a", "en", text="x"), Document("a", "en", text="y")], 10, '"a" occurs twice in "en"'),
        ([Document("a", "en", text="x")], 2**16, "too large"),
        ([Document("a", "en", text="x")], 0, "sentence-tokens"),
        ([Document("a", "en", text="x")], -1, "sentence-tokens"),
    ],
    ids=["no documents", "no tokens", "twice", "budget too large", "budget 0", "budget -1"],
)
def test_bad_input_leaves_nothing(documents, budget, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        build_shards([write_documents(tmp_path / "a.jsonl", documents)], tokenizer, budget, tmp_path / "out", "wds")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_tokenizer_without_special_tokens_is_bad_input(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="needs a cls"):
        build_shards([tmp_path / "a.jsonl"], plain, 10, tmp_path / "out", "wds")
    assert list(tmp_path.iterdir()) == []


def test_largest_budget_fits_the_length_field(tokenizer, tmp_path):
    sentence = "bee " * 70_000
    count = len(tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"])
    path = write_documents(tmp_path / "a.jsonl", [Document("a", "en", sentences=(sentence,))])
    build_shards([path], tokenizer, 2**16 - 3, tmp_path / "out", "wds")
    lengths = GroupReader(ShardIndex.open(tmp_path / "out"))[0].sentence_lengths
    assert lengths.tolist() == [2**16 - 3] * (count // (2**16 - 3)) + [count % (2**16 - 3)]
