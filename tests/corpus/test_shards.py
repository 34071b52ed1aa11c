import hashlib
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.corpus import shards as module
from hmde_dist.corpus.documents import Document, group_documents, read_documents
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.shards import (
    COLUMNS,
    build_shards,
    candidate_clusters,
    choose_clusters,
    decode_group,
    encode_group,
)
from hmde_dist.corpus.text import SentenceTokenizer
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

CONTAINERS = ("mds", "wds")
BUDGET = 24

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
    assert data == b"HMDG" + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.fixture(scope="module", params=CONTAINERS)
def index(request, shards) -> ShardIndex:
    return ShardIndex.open(shards(request.param))


@pytest.fixture(scope="module")
def expected(documents_folder, tokenizer) -> dict[str, dict[str, list[np.ndarray]]]:
    """Token pieces by id and language, straight from the documents."""
    encoder = SentenceTokenizer(tokenizer, BUDGET)
    groups = group_documents(read_documents([documents_folder / "train.jsonl.gz"]))
    return {
        id_: {lang: encoder.encode([split_sentences(d.text, lang)])[0] for lang, d in versions.items()}
        for id_, versions in groups.items()
    }


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
        assert index.manifest["clusters"][columns["group_cluster"][group]].count("/") == 1


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
    }
    assert manifest["vocabulary"] == len(tokenizer)
    assert manifest["sentence_tokens"] == BUDGET
    assert manifest["dropped"] == {"documents_without_tokens": 0}
    for entry in manifest["shards"]:
        data = (index.folder / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_groups_lie_in_order_of_category_and_id(index):
    reader = GroupReader(index)
    order = [(int(index.columns["group_cluster"][group]), reader[group].id) for group in range(index.groups)]
    assert order == sorted(order)
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
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 16)
    documents = list(read_documents([documents_folder / "train.jsonl.gz"]))
    build_shards(reversed(documents), tokenizer, BUDGET, tmp_path / "again", container)
    for path in shards(container).rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(shards(container))).read_bytes() == path.read_bytes()


def group(*versions):
    return {lang: Document("a", lang, text="x", categories=categories) for lang, *categories in versions}


def test_candidates_are_categories_and_paths_of_the_english_version_or_the_first():
    assert candidate_clusters(group(("de", "x"), ("en", "y", "z"))) == {"y", "z", "y/z"}
    assert candidate_clusters(group(("de", "x"), ("en",))) == {"x"}
    assert candidate_clusters(group(("de",), ("en",))) == set()


def test_a_cluster_is_the_smallest_category_that_is_shared():
    groups = {
        "a": group(("en", "writer", "guide")),
        "b": group(("en", "writer", "guide")),
        "c": group(("en", "writer", "index")),
        "d": group(("en", "calc", "guide")),
        "e": group(("en", "physicists", "1900 births", "a's own")),
        "f": group(("en", "1900 births", "chemists")),
        "g": group(("en", "alone")),
    }
    clusters = choose_clusters(groups)
    assert clusters == {
        "a": "writer/guide",
        "b": "writer/guide",
        "c": "writer",
        "d": "guide",
        "e": "1900 births",
        "f": "1900 births",
        "g": "",
    }


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_dropped_and_cut_is_counted(container, tokenizer, tmp_path):
    documents = [
        Document("a", "en", text="..."),
        Document("a", "de", sentences=("Two bees.", "bee " * 30)),
        Document("a", "fr", text="Two bees. Three bees."),
        Document("b", "en", text="!"),
    ]
    manifest = build_shards(documents, tokenizer, 10, tmp_path / "out", container)
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
    manifest = build_shards(documents, tokenizer, 10, tmp_path / "out", "wds")
    assert manifest["clusters"] == ["", "x"]
    assert ShardIndex.open(tmp_path / "out").columns["group_cluster"].tolist() == [module.NO_CLUSTER, 1, 1]


@pytest.mark.parametrize("container", CONTAINERS)
def test_failed_shards_leave_nothing(container, tokenizer, tmp_path, monkeypatch):
    documents = [Document(id_, lang, text="Two bees.") for id_ in "ab" for lang in ("de", "en")]
    calls = []

    def breaks_on_the_second(id_, kept):
        calls.append(id_)
        if len(calls) == 2:
            raise OSError("disk full")
        return encode_group(id_, kept)

    monkeypatch.setattr(module, "encode_group", breaks_on_the_second)
    with pytest.raises(OSError, match="disk full"):
        build_shards(documents, tokenizer, 10, tmp_path / "out", container)
    assert list(tmp_path.iterdir()) == []


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
        build_shards(documents, tokenizer, budget, tmp_path / "out", "wds")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_without_special_tokens_is_bad_input(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="needs a cls"):
        build_shards([Document("a", "en", text="x")], plain, 10, tmp_path / "out", "wds")
    assert list(tmp_path.iterdir()) == []


def test_largest_budget_fits_the_length_field(tokenizer, tmp_path):
    sentence = "bee " * 70_000
    count = len(tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"])
    build_shards([Document("a", "en", sentences=(sentence,))], tokenizer, 2**16 - 3, tmp_path / "out", "wds")
    lengths = GroupReader(ShardIndex.open(tmp_path / "out"))[0].sentence_lengths
    assert lengths.tolist() == [2**16 - 3] * (count // (2**16 - 3)) + [count % (2**16 - 3)]
