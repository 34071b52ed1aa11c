"""The reader of CirrusSearch dumps on the sample of three wikis, on damaged files, and the search for dump files."""

import bz2
import gzip
import json
import tracemalloc

import pytest
import wikipedia_dumps as dumps
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.corpus import cirrus
from hmde_dist.corpus.cirrus import Page, find_dumps, language_of, read_pages
from hmde_dist.corpus.documents import LANGUAGE_CODE

NAME = "xxwiki_content-20260816-00000.json"
ACTION = b'{"index":{"_id":1}}\n'
MINIMAL = {"page_id": 1, "namespace": 0, "title": "A", "text": "b"}


@pytest.fixture
def read(tmp_path):
    """`read(content, suffix="")`: the pages of a dump file with this content, and the problems."""

    def pages(content, suffix="", chunk=1 << 16):
        path = tmp_path / (NAME + suffix)
        path.write_bytes(content)
        problems = []
        return list(read_pages(path, problems, chunk)), problems

    return pages


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def minimal(count, start=1):
    return [MINIMAL | {"page_id": number} for number in range(start, start + count)]


@pytest.mark.parametrize("wiki", ["enwiki", "dewiki", "jawiki"])
def test_the_sample(tmp_path, wiki):
    paths = dumps.write_cirrus(tmp_path, wiki, dumps.sample_pages(wiki))
    problems = []
    pages = {page.page_id: page for path in paths for page in read_pages(path, problems)}
    assert problems == []
    assert len(pages) == len(dumps.sample_pages(wiki))
    for source in dumps.sample_pages(wiki):
        page = pages[source["page_id"]]
        assert (page.wiki, page.title, page.text) == (wiki, source["title"], source.get("text", ""))
        assert (page.namespace, page.item) == (source["namespace"], source.get("wikibase_item", ""))
        assert page.is_redirect == (page.page_type == "redirect") == ("redirect_target" in source)


def test_every_field(read):
    page = {
        **MINIMAL, "wiki": "jawiki", "text": "é", "wikibase_item": "Q5", "category": ["A b", "C"], "language": "ja",
        "page_type": "primary", "template": "Template:One", "weighted_tags": [
            "classification.prediction.articletopic/Low|12", "classification.prediction.articletopic/High.*|998",
            "classification.prediction.articletopic/Low, too|12", "recommendation.link/exists|1000",
            "classification.prediction.articletopic/__DELETE_GROUPING__", "classification.prediction.articletopic/None",
        ],
    }  # fmt: skip
    topics = ("High.*", "Low", "Low, too", "None")
    expected = Page("jawiki", 1, 0, "A", "é", "Q5", ("A b", "C"), "primary", topics, "ja", ("Template:One",))
    assert read(dumps.cirrus_lines([page])) == ([expected], [])


@pytest.mark.parametrize(
    "action", [{"_id": 7}, {"_id": "7"}, {"_type": "page", "_id": "7"}, {"_type": "_doc", "_id": 7}]
)
def test_only_title_namespace_and_text_are_required(read, action):
    document = {"namespace": 0, "title": "A", "text": "", "category": None, "wikibase_item": None, "weighted_tags": []}
    expected = [Page(wiki="xxwiki", page_id=7, namespace=0, title="A", text="")]
    assert read(lines({"index": action}, document)) == (expected, [])


def test_text_that_speaks_of_an_index_is_text(read):
    page = MINIMAL | {"text": '{"index":{"_id":2}}', "index": {"_id": 3}}
    assert read(dumps.cirrus_lines([page]))[0][0].text == page["text"]


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".gz", gzip.compress), ("", bytes)])
@given(chunk=st.integers(1, 400))
def test_every_container_at_any_chunk_size(tmp_path_factory, suffix, pack, chunk):
    path = tmp_path_factory.getbasetemp() / f"{NAME}{suffix}"
    path.write_bytes(pack(dumps.cirrus_lines(minimal(2))) + pack(dumps.cirrus_lines(minimal(3, 3))))
    problems = []
    assert [page.page_id for page in read_pages(path, problems, chunk)] == [1, 2, 3, 4, 5]
    assert problems == []


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"title": None}, '"title" is missing'),
        ({"title": ""}, '"title" is empty'),
        ({"text": None}, '"text" is missing'),
        ({"text": 3}, '"text" is no string'),
        ({"namespace": None}, '"namespace" is missing'),
        ({"namespace": True}, '"namespace" is missing or no integer'),
        ({"category": [1]}, '"category" is no list of strings'),
        ({"category": {"a": "b"}}, '"category" is no list of strings'),
        ({"wikibase_item": 5}, '"wikibase_item" is no string'),
        ({"text": "half \ud83d"}, "surrogates not allowed"),
        ({"page_id": "A", "_id": "B"}, 'neither "page_id" nor "_id" is a number'),
    ],
)
def test_a_wrong_record_is_left_out(read, document, reason):
    action = {"index": {"_id": document.pop("_id", 1)}}
    good = dumps.cirrus_lines(minimal(1, 5))
    pages, problems = read(good + lines(action, MINIMAL | document) + good)
    assert [page.page_id for page in pages] == [5, 5]
    assert len(problems) == 1
    place = f"left out at byte {len(good) + len(lines(action))} (decompressed), after 1 pages: "
    assert place in problems[0]
    assert reason in problems[0]


def test_the_first_wrong_records_are_named_and_the_others_counted(read):
    pages, problems = read(dumps.cirrus_lines([MINIMAL | {"title": None}] * 7 + minimal(1)))
    assert len(pages) == 1
    assert len(problems) == cirrus.SHOWN_PROBLEMS + 1
    assert problems[-1].endswith(f"{NAME}: 4 more records left out")


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (ACTION, "an action line without its document"),
        (lines(MINIMAL), "a document without its action line"),
        (ACTION + b'{"title": "half\n', "no JSON, or half a line (Unterminated string"),
        (b'{"index":{"_i\n' + lines(MINIMAL), "no JSON, or half a line (Unterminated string"),
        (ACTION + b'{"text": "\xff"}\n', "can't decode byte 0xff"),
        (ACTION + b"[1, 2]\n", "expected an object, found list"),
        (ACTION + b"[" * 100_000 + b"\n", "no JSON"),
    ],
)
def test_reading_goes_on_after_lines_that_do_not_pair(read, between, reason):
    pages, problems = read(dumps.cirrus_lines(minimal(2)) + between + dumps.cirrus_lines(minimal(2, 3)))
    assert [page.page_id for page in pages] == [1, 2, 3, 4]
    assert len(problems) == 1
    assert reason in problems[0]


def test_blank_lines_and_a_missing_last_newline_are_no_problem(read):
    content = b"\n" + dumps.cirrus_lines(minimal(2)).replace(b"\n", b"\r\n\n")
    assert len(read(content.rstrip())[0]) == 2
    assert read(content.rstrip())[1] == []


def test_truncated_anywhere(read):
    content = dumps.cirrus_lines(minimal(3))
    whole = [len(dumps.cirrus_lines(minimal(count))) for count in (1, 2, 3)]
    for cut in range(1, len(content)):
        pages, problems = read(content[:cut])
        assert [page.page_id for page in pages] == [1, 2, 3][: sum(end - 1 <= cut for end in whole)]
        assert len(problems) == (cut not in whole and cut + 1 not in whole)


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".gz", gzip.compress)])
def test_truncated_and_damaged_archives(read, suffix, pack):
    first, second = dumps.cirrus_lines(minimal(2)), dumps.cirrus_lines(minimal(2, 3))
    for rest in (pack(second)[:-3], pack(second)[:12]):
        pages, problems = read(pack(first) + rest, suffix)
        assert [page.page_id for page in pages][:2] == [1, 2]
        assert len(problems) == 1
        assert f"{NAME}{suffix}: damaged at byte " in problems[0]
        assert f"after {len(pages)} pages: cut short" in problems[0]


def test_damage_in_the_middle_of_a_long_archive(read):
    stored = bytearray(bz2.compress(dumps.cirrus_lines(minimal(60_000))))
    stored[len(stored) * 9 // 10] ^= 255
    pages, problems = read(bytes(stored), ".bz2")
    assert [page.page_id for page in pages] == list(range(1, len(pages) + 1))
    assert pages
    assert len(problems) == 1
    assert f"after {len(pages)} pages: corrupt" in problems[0]


def test_an_empty_file_is_a_problem_and_a_missing_one_an_error(read, tmp_path):
    pages, problems = read(b"", ".bz2")
    assert pages == []
    assert problems[0].endswith("damaged at byte 0 (decompressed), after 0 pages: empty")
    with pytest.raises(InputError, match="cannot be read"):
        list(read_pages(tmp_path / "none.json", []))


def test_memory_is_constant(tmp_path, monkeypatch):
    path = tmp_path / f"{NAME}.gz"
    path.write_bytes(gzip.compress(dumps.cirrus_lines(MINIMAL | {"text": "x" * 5000} for _ in range(1000)), 1))
    tracemalloc.start()
    assert sum(1 for _ in read_pages(path, [], 1 << 14)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19
    monkeypatch.setattr(cirrus, "LONGEST_LINE", 1000)
    problems = []
    assert list(read_pages(path, problems, 1000)) == []
    assert "a line of more than" in problems[0]


def test_find_dumps(tmp_path):
    dumps.write_sample(tmp_path)
    newest = dumps.write_cirrus(tmp_path / "mirror", "enwiki", dumps.sample_pages("enwiki"), parts=12, date="20260823")
    latest = dumps.write_sql(tmp_path, "jawiki", "langlinks", [], date="latest")
    plain = tmp_path / "dewiki-20261101-page.sql"
    plain.write_bytes(dumps.sql_text("dewiki", "page", []))
    newest[3] = newest[3].rename(tmp_path / newest[3].name)
    twin = newest[0].with_suffix("")
    (tmp_path / "enwiki_general-20260823-00000.json.bz2").touch()
    (tmp_path / "enwiki-20261001-pagelinks.sql.gz").touch()
    (tmp_path / f".{NAME}.part").touch()
    twin.write_bytes(bz2.decompress(newest[0].read_bytes()))
    found = find_dumps(tmp_path)
    assert found.wikis["enwiki"] == [twin, *newest[1:]]
    assert [path.name[-14:] for path in found.wikis["jawiki"]] == ["00000.json.bz2", "00001.json.bz2"]
    assert {wiki: set(tables) for wiki, tables in found.sql.items()} == {
        **dict.fromkeys(["enwiki", "dewiki", "jawiki"], set(cirrus.SQL_TABLES) - {"wb_items_per_site"}),
        "wikidatawiki": {"wb_items_per_site"},
    }
    assert (found.sql["jawiki"]["langlinks"], found.sql["dewiki"]["page"]) == (latest, plain)
    assert found.notes == [
        f"{newest[0]}: left out, for {twin} is the same dump",
        "dewiki page: 20261001 left out, for 20261101 is newer",
        "enwiki content: 20260816 left out, for 20260823 is newer",
        "jawiki langlinks: 20261001 left out, for latest is newer",
    ]
    with pytest.raises(InputError, match="nowhere: no such folder of dumps"):
        find_dumps(tmp_path / "nowhere")


def test_language_of():
    codes = {
        "enwiki": "en", "nowiki": "no", "simplewiki": "simple", "zh_yuewiki": "zh-yue", "zh_min_nanwiki": "zh-min-nan",
        "nds_nlwiki": "nds-nl", "roa_rupwiki": "roa-rup", "bat_smgwiki": "bat-smg", "map_bmswiki": "map-bms",
        "be_x_oldwiki": "be-tarask", "zh_classicalwiki": "lzh", "cebwiki": "ceb",
    }  # fmt: skip
    assert {wiki: language_of(wiki) for wiki in codes} == codes
    assert all(map(LANGUAGE_CODE.fullmatch, codes.values()))
    for wiki in ("enwiktionary", "commonswiki", "wikidatawiki", "wiki", "en", ""):
        with pytest.raises(InputError, match="is no Wikipedia"):
            language_of(wiki)
