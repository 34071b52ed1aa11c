import gzip
import json
from collections import Counter

import pytest
from wikipedia_dumps import write_cirrus, write_sample

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import SPLITS, read_documents, split_of
from hmde_dist.corpus.wikipedia import Filters, build_documents, choose_category

LANGUAGES = ("en", "de", "ja")
TEXT = "One sentence here. Two sentences now. Three of them. Four in all. Five at last. Six for luck."


def page(page_id, item, title="Page", text=TEXT, **more):
    return {
        "page_id": page_id,
        "namespace": 0,
        "title": f"{title} {page_id}",
        "text": text,
        "wikibase_item": item,
    } | more


def documents(out):
    paths = [out / f"{split}.jsonl.gz" for split in SPLITS]
    return [d for path in paths if gzip.open(path).read(1) for d in read_documents([path])]


@pytest.mark.parametrize("schema", ["old", "transitional", "new"])
@pytest.mark.parametrize("layout", ["lines", "one_line"])
def test_the_sample_gives_the_same_bytes_on_one_and_three_processes(layout, schema, tmp_path):
    write_sample(tmp_path / "dumps", layout, schema)
    for workers in (1, 3):
        build_documents(tmp_path / "dumps", LANGUAGES, tmp_path / f"out{workers}", workers, Filters(min_sentences=1))
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert names == ["report.json", "test.jsonl.gz", "train.jsonl.gz", "validation.jsonl.gz"]
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()
    found = documents(tmp_path / "out1")
    assert len(found) == 11 and len({d.id for d in found}) == 4
    assert all(d.sentences and not d.text for d in found)
    report = json.loads((tmp_path / "out1" / "report.json").read_text())
    counts = Counter()
    for of_language in report["filters"].values():
        counts.update(of_language)
    dropped = sum(counts.values()) - counts["pages"]
    assert counts["pages"] - dropped == len(found) + report["left_out_one_language"]
    assert report["problems"] == []


def test_groups_go_whole_to_the_split_of_their_item(tmp_path):
    items = [f"Q{number}" for number in range(60)]
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(i, item) for i, item in enumerate(items)])
    report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    assert report["groups"] == 60
    expected = Counter(split_of(item) for item in items)
    for split in SPLITS:
        ids = [d.id for d in read_documents([tmp_path / "out" / f"{split}.jsonl.gz"])]
        assert Counter(ids) == Counter({item: 2 for item in items if split_of(item) == split})
        assert len(ids) == 2 * expected[split]


def test_every_filter_counts_what_it_drops(tmp_path):
    pages = [
        page(1, "Q1"),
        page(2, "Q2", namespace=14),
        page(3, "Q3", page_type="redirect"),
        page(4, None),
        page(5, "Q5", title="List of things"),
        page(6, "Q6", text="Too short. Really."),
        page(7, "Q7", text=TEXT.translate(str.maketrans("aeio", "аеіо")) + "Русский текст. " * 20),
        page(8, "Q1"),
        page(9, "Q9"),
    ]
    pages[6]["text"] = "Это русский текст. " * 8
    write_cirrus(tmp_path / "dumps", "enwiki", pages)
    write_cirrus(tmp_path / "dumps", "dewiki", [page(1, "Q1")])
    report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    expected = dict.fromkeys(("namespace", "redirect", "no_item", "list", "short", "wrong_script", "item_twice"), 1)
    assert report["filters"]["en"] == {"pages": 9, "disambiguation": 0} | expected
    assert (report["groups"], report["left_out_one_language"]) == (1, 1)
    assert {d.lang: d.title for d in documents(tmp_path / "out")} == {"en": "Page 1", "de": "Page 1"}


def test_long_pages_are_cut_and_reference_lists_removed(tmp_path):
    text = "A sentence here. " * 100 + "  ^ Somebody, Some book. Another book."
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(1, "Q1", text=text), page(2, "Q2", text=TEXT + "  ^ A book. B.")])
    build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1, Filters(max_sentences=10))
    assert {(d.id, len(d.sentences)) for d in documents(tmp_path / "out")} == {("Q1", 10), ("Q2", 6)}


def test_a_group_is_put_under_its_smallest_shared_category():
    versions = [{"categories": ["Q10", "en:Alone", "Q20"], "topic": "STEM"}, {"categories": ["Q30"], "topic": ""}]
    sizes = Counter({"Q10": 50, "Q20": 3, "Q30": 3, "en:Alone": 1})
    assert choose_category(versions, sizes) == ("STEM", "Q20")
    assert choose_category(versions, Counter({"Q10": 5000})) == ("STEM",)
    assert choose_category([{"categories": [], "topic": ""}], sizes) == ()


def test_a_damaged_file_is_reported_and_the_rest_is_kept(tmp_path):
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(i, f"Q{i}") for i in range(20)], parts=2)
    part = sorted((tmp_path / "dumps").rglob("enwiki_content-*.bz2"))[1]
    part.write_bytes(part.read_bytes()[:-20])
    report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 2)
    assert len(report["problems"]) == 1 and str(part) in report["problems"][0]
    assert 10 <= report["groups"] < 20


def test_a_language_without_a_dump_is_named_and_nothing_is_left(tmp_path):
    write_cirrus(tmp_path / "dumps", "enwiki", [page(1, "Q1")])
    with pytest.raises(InputError, match="no content dump for fr; there are dumps for: en"):
        build_documents(tmp_path / "dumps", ("en", "fr"), tmp_path / "out", 1)
    write_cirrus(tmp_path / "dumps", "dewiki", [page(1, "Q2")])
    with pytest.raises(InputError, match="no Wikidata item has a page in two of en, de"):
        build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]
