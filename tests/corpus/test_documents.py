import gzip
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import (
    SPLITS,
    Document,
    parse_document,
    split_of,
    write_splits,
)
from hmde_dist.corpus.readers import read_documents

GOOD = {"id": "Q42", "lang": "en", "text": "A text."}


def line(**changes) -> bytes:
    record = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return json.dumps(record, ensure_ascii=False).encode()


def read(path, content: bytes) -> list[Document]:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return list(read_documents([path]))


def test_every_field_is_read():
    record = line(text=..., title="T", sentences=["a", "b"], categories=["c", "d"], lang="zh-cn")
    assert parse_document(record, "f:1") == Document("Q42", "zh-cn", "T", "", ("a", "b"), ("c", "d"))


def test_unknown_and_null_fields_are_no_error():
    record = line(title=None, sentences=None, categories=None, url="http://x", revision={"a": [1]})
    assert parse_document(record, "f:1") == Document("Q42", "en", text="A text.")


def test_a_whole_number_is_an_id():
    assert parse_document(line(id=42), "f:1") == Document("42", "en", text="A text.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line(id=...), 'a document needs a non-empty string "id"'),
        (line(id=""), 'a document needs a non-empty string "id"'),
        (line(id=4.2), 'a document needs a non-empty string "id"'),
        (line(id=True), 'a document needs a non-empty string "id"'),
        (line(lang=...), 'a document needs a non-empty string "lang"'),
        (line(lang=None), 'a document needs a non-empty string "lang"'),
        (line(lang="EN"), '"lang" is "EN"; use a lower-case code such as "en"'),
        (line(lang="en_GB"), '"lang" is "en_GB"'),
        (line(lang="en\n"), '"lang" is'),
        (line(lang="e"), '"lang" is "e"'),
        (line(text=...), 'document "Q42" (en) is empty: it needs "text" or "sentences"'),
        (line(text=" \n\u3000"), 'document "Q42" (en) is empty'),
        (line(text=..., sentences=["", " "]), 'document "Q42" (en) is empty'),
        (line(text=3), '"text" must be a string'),
        (line(title=["T"]), '"title" must be a string'),
        (line(text=..., sentences="A text."), '"sentences" must be a list of strings'),
        (line(text=..., sentences=["a", 1]), '"sentences" must be a list of strings'),
        (line(categories={"a": 1}), '"categories" must be a list of strings'),
        (line(title=0), '"title" must be a string'),
        (line(text=False, sentences=["a"]), '"text" must be a string'),
        (line(sentences={}), '"sentences" must be a list of strings'),
        (line(categories=""), '"categories" must be a list of strings'),
        (line(sentences=["a"]), 'both "text" and "sentences"; keep one'),
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf" + line(), "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (line() + line(), "not JSON"),
        ('{"id": "é"}'.encode("latin-1"), "not UTF-8 (byte 8 is 0xe9); re-encode the file as UTF-8"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (rb'{"id": "Q42", "lang": "en", "text": "half a pair: \ud83d"}', "text"),
        (rb'{"id": "\udc00", "lang": "en", "text": "A text."}', "id"),
        (b"[" * 200_000, "not JSON"),
        (b'{"id": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[-24:]),
)
@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_wrong_line_is_named(tmp_path, name, wrong, message):
    path = tmp_path / name
    with pytest.raises(InputError) as refused:
        read(path, line(id="before") + b"\n\n" + wrong + b"\n" + line(id="behind") + b"\n")
    assert str(refused.value).startswith(f"{path}:3: ")
    assert message in str(refused.value)


def test_document_that_occurs_twice_is_named(tmp_path):
    documents = [Document("Q42", lang, text="x") for lang in ("en", "de", "en")]
    with pytest.raises(InputError, match='"Q42" occurs twice in "en"'):
        write_splits(documents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_split_of_an_id_never_changes():
    ids = ["Q1", "Q2", "Q3", "Q64", "Q64000", "é", "漢字", "lo:swriter/guide/letter", "small:honey-bee"]
    expected = ["train", "validation", "train", "validation", "train", "train", "test", "train", "test"]
    assert [split_of(id_) for id_ in ids] == expected


def test_splits_have_the_promised_shares():
    shares = Counter(split_of(f"Q{number}") for number in range(10_000))
    assert set(shares) == set(SPLITS)
    assert abs(shares["train"] - 8000) < 150
    assert abs(shares["validation"] - 1000) < 120


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
documents_strategy = st.builds(
    lambda id_, lang, title, content, categories: Document(id_, lang, title, *content, tuple(categories)),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
    st.sampled_from(["en", "zh-cn", "pt-br"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.one_of(
        st.tuples(texts, st.just(())),
        st.tuples(st.just(""), st.lists(texts, min_size=1, max_size=3).map(tuple)),
    ),
    st.lists(texts, max_size=3),
)


@given(documents_strategy)
def test_a_document_survives_its_line(document):
    written = document.as_json().encode()
    assert b"\n" not in written
    assert parse_document(written, "f:1") == document


def test_splits_hold_every_document_once(small_corpus, documents_folder):
    splits = {split: list(read_documents([documents_folder / f"{split}.jsonl.gz"])) for split in SPLITS}
    everything = [document for documents in splits.values() for document in documents]
    assert sorted(everything, key=lambda d: (d.id, d.lang)) == sorted(
        read_documents([small_corpus]), key=lambda d: (d.id, d.lang)
    )
    for split, documents in splits.items():
        assert {split_of(document.id) for document in documents} == {split}


def test_report_counts_what_was_written(documents_folder):
    report = json.loads((documents_folder / "report.json").read_text(encoding="utf-8"))
    assert (report["groups"], report["left_out_one_language"]) == (44, 0)
    for split in SPLITS:
        documents = list(read_documents([documents_folder / f"{split}.jsonl.gz"]))
        assert report["splits"][split] == {
            "groups": len({document.id for document in documents}),
            "documents": dict(sorted(Counter(document.lang for document in documents).items())),
        }


def test_order_of_the_input_does_not_reach_the_files(small_corpus, documents_folder, tmp_path):
    write_splits(reversed(list(read_documents([small_corpus]))), tmp_path / "again")
    names = sorted(path.name for path in documents_folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (documents_folder / name).read_bytes()
    assert (documents_folder / "test.jsonl.gz").read_bytes()[4:8] == bytes(4), "the time of writing"


def test_ids_with_one_language_are_left_out_and_counted(tmp_path):
    documents = [Document("two", "en", text="x"), Document("two", "de", text="x"), Document("one", "en", text="x")]
    report = write_splits(documents, tmp_path / "out")
    assert (report["groups"], report["left_out_one_language"]) == (1, 1)
    lines = gzip.decompress((tmp_path / "out" / f"{split_of('two')}.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["two", "two"]


def failing():
    yield from (Document("a", lang, text="x") for lang in ("de", "en"))
    raise InputError("broken source")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (lambda: [Document("a", "en", text="x")], "no id occurs in two languages: comparable documents must share"),
        (lambda: [], "no id occurs in two languages"),
        (failing, "broken source"),
    ],
)
def test_failed_splits_leave_nothing(tmp_path, documents, message):
    with pytest.raises(InputError, match=message):
        write_splits(documents(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_splits_that_fail_while_writing_leave_nothing(tmp_path):
    documents = [Document("a", lang, text="\ud83d") for lang in ("de", "en")]
    with pytest.raises(UnicodeEncodeError):
        write_splits(documents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_splits_do_not_overwrite(tmp_path):
    (tmp_path / "kept").touch()
    documents = [Document("a", lang, text="x") for lang in ("de", "en")]
    with pytest.raises(InputError, match="not empty"):
        write_splits(documents, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
