import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from launch import ROOT, environment
from wikipedia_dumps import sample_rows, write_cirrus, write_sample, write_sql

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import SPLITS, split_of
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.shard_build import build_shards
from hmde_dist.corpus.steps import ShareDone
from hmde_dist.corpus.wikipedia import STEPS, Filters, build_documents, describe_plan
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

LANGUAGES = ("en", "de", "ja")
EVERYTHING = Filters(min_sentences=1, min_characters=1)


def text_of(number: int, sentences: int = 6) -> str:
    """A text that is like no other number's."""
    draw = random.Random(number)
    words = ["".join(draw.choices("abcdefghijklmnopqrst", k=draw.randint(3, 9))) for _ in range(6 * sentences)]
    return " ".join(" ".join(words[i::sentences]).capitalize() + "." for i in range(sentences))


def page(page_id, item, title="Page", text=None, **more):
    text = text_of(page_id) if text is None else text
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
        build_documents(tmp_path / "dumps", LANGUAGES, tmp_path / f"out{workers}", workers, EVERYTHING)
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert names == ["report.json", "test.jsonl.gz", "train.jsonl.gz", "validation.jsonl.gz"]
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()
    found = documents(tmp_path / "out1")
    groups = {item: sorted(d.lang for d in found if d.id == item) for item in {d.id for d in found}}
    assert groups == {"Q6607": ["de", "ja"]} | {item: ["de", "en", "ja"] for item in ("Q405", "Q5994", "Q11442")}
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
        page(7, "Q7", text="Это русский текст. " * 8),
        page(8, "Q1"),
        page(9, "Q9"),
        page(10, "Q10", text=text_of(9).upper()),
        page(11, "Q11", text=text_of(9, 6).replace("a", "b", 1)),
    ]
    write_cirrus(tmp_path / "dumps", "enwiki", pages)
    write_cirrus(tmp_path / "dumps", "dewiki", [page(1, "Q1")])
    report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    dropped_once = "namespace redirect no_item list stub wrong_script item_twice exact_duplicate near_duplicate"
    expected = {"pages": 11, "disambiguation": 0, "over_cap": 0} | dict.fromkeys(dropped_once.split(), 1)
    assert report["filters"]["en"] == expected
    assert (report["groups"], report["left_out_one_language"]) == (1, 1)
    assert {d.lang: d.title for d in documents(tmp_path / "out")} == {"en": "Page 1", "de": "Page 1"}


def test_long_pages_are_cut_and_reference_lists_removed(tmp_path):
    text = text_of(1, 100) + "  ^ Somebody, Some book. Another book."
    for wiki in ("enwiki", "dewiki"):
        pages = [page(1, "Q1", text=text), page(2, "Q2", text=text_of(2) + "  ^ A book. B.")]
        write_cirrus(tmp_path / "dumps", wiki, pages)
    build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1, Filters(max_sentences=10))
    assert {(d.id, len(d.sentences)) for d in documents(tmp_path / "out")} == {("Q1", 10), ("Q2", 6)}


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
        build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]


def categories_of(out) -> dict[str, tuple[str, ...]]:
    return {d.id: d.categories for d in documents(out)}


def category_tables(folder, wiki, items, hidden=(), parents=(), schema="new"):
    """Category pages 900, 901 ... of `items` (title: item or None), and edges (child, parent) between them."""
    number = {title: 900 + place for place, title in enumerate(items)}
    page_row = sample_rows("enwiki", "page")[0]
    pages = [page_row | {"page_id": n, "page_namespace": 14, "page_title": t} for t, n in number.items()]
    write_sql(folder, wiki, "page", pages, schema=schema)
    props = [(number[t], b"wikibase_item", item.encode()) for t, item in items.items() if item]
    props += [(number[t], b"hiddencat", b"") for t in hidden]
    rows = [{"pp_page": p, "pp_propname": n, "pp_value": v} for p, n, v in props]
    write_sql(folder, wiki, "page_props", rows)
    targets = [{"lt_id": n, "lt_namespace": 14, "lt_title": t} for t, n in number.items()]
    write_sql(folder, wiki, "linktarget", targets)
    link = sample_rows("enwiki", "categorylinks")[0]
    links = [
        link | {"cl_from": number[child], "cl_to": parent, "cl_target_id": number[parent], "cl_type": "subcat"}
        for child, parent in parents
    ]
    write_sql(folder, wiki, "categorylinks", links, schema=schema)


def both(folder, pages):
    """The same pages in English and German, the German ones with `de` categories."""
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(folder, wiki, [{k: v for k, v in p.items() if k != "de"} | ({"category": p.get("de", [])} if wiki == "dewiki" else {}) for p in pages])  # fmt: skip


@pytest.mark.parametrize("schema", ["old", "transitional", "new"])
def test_categories_are_neutral_then_parents_then_topics(schema, tokenizer, tmp_path):
    dumps = tmp_path / "dumps"
    tag = [
        "classification.prediction.articletopic/STEM.Space|900",
        "classification.prediction.articletopic/Culture|100",
    ]
    pages = [
        # Two groups meet in a category that is called differently in each language, and in a larger one.
        page(1, "Q1", category=["Cats", "Animals", "Tracked"]),
        page(2, "Q2", category=["Animals", "Tracked"], de=["Katzen"]),
        page(3, "Q3", category=["Animals"]),
        # Alone in their categories, which share a parent; the graph has a cycle.
        page(4, "Q4", category=["Oboes"]),
        page(5, "Q5", category=["Flutes"]),
        # Nothing but a topic, once from a hidden category.
        page(6, "Q6", category=["Tracked"], weighted_tags=tag),
        page(7, "Q7", category=["Alone"], weighted_tags=tag[::-1]),
        page(8, "Q8"),
    ]
    both(dumps, pages)
    english = {
        "Cats": "Q100",
        "Animals": None,
        "Tracked": None,
        "Oboes": None,
        "Flutes": "Q101",
        "Woodwinds": "Q102",
        "Music": None,
    }
    cycle = [("Oboes", "Woodwinds"), ("Flutes", "Woodwinds"), ("Woodwinds", "Music"), ("Music", "Oboes")]
    category_tables(dumps, "enwiki", english, ["Tracked"], cycle, schema)
    category_tables(dumps, "dewiki", {"Katzen": "Q100"}, schema=schema)
    build_documents(dumps, ("en", "de"), tmp_path / "out", 2)
    assert categories_of(tmp_path / "out") == {
        "Q1": ("en:Animals", "Q100"),
        "Q2": ("en:Animals", "Q100"),
        "Q3": ("en:Animals",),
        "Q4": ("Q102",),
        "Q5": ("Q102",),
        "Q6": ("STEM.Space",),
        "Q7": ("STEM.Space",),
        "Q8": (),
    }
    # The same clusters arrive in the shards, on one process and on four.
    paths = [path for split in SPLITS if gzip.open(path := tmp_path / "out" / f"{split}.jsonl.gz").read(1)]
    for workers in (1, 4):
        manifest = build_shards(paths, tokenizer, 24, tmp_path / f"shards{workers}", "wds", workers)
    assert contents(tmp_path / "shards1") == contents(tmp_path / "shards4")
    reader = GroupReader(index := ShardIndex.open(tmp_path / "shards1"))
    samples = [reader[group] for group in range(index.groups)]
    assert {sample.id: sample.languages for sample in samples} == {f"Q{n}": ["de", "en"] for n in range(1, 9)}
    clusters = [manifest["clusters"][number] for number in index.columns["group_cluster"]]
    expected = ["Q100", "Q100", "en:Animals", "Q102", "Q102", "STEM.Space", "STEM.Space", ""]
    assert {s.id: c for s, c in zip(samples, clusters, strict=True)} == {f"Q{n + 1}": c for n, c in enumerate(expected)}
    with gzip.open(tmp_path / "out" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        topics = {record["id"]: record.get("topic") for record in map(json.loads, file)}
    assert {item: topics[item] for item in topics if item in ("Q6", "Q7", "Q8")} == {
        item: None if item == "Q8" else "STEM.Space" for item in topics if item in ("Q6", "Q7", "Q8")
    }


def test_pages_without_an_item_get_theirs_from_the_sql_dumps(tmp_path):
    dumps = tmp_path / "dumps"
    titles = {1: "By props", 2: "By sitelink", 3: "By link", 4: "Lost"}
    write_cirrus(dumps, "enwiki", [page(n, None) | {"title": title} for n, title in titles.items()])
    write_cirrus(dumps, "dewiki", [page(n, f"Q{n}") | {"title": f"Seite {n}"} for n in titles])
    write_sql(dumps, "enwiki", "page_props", [{"pp_page": 1, "pp_propname": "wikibase_item", "pp_value": "Q1"}])
    sites = [(2, "enwiki", "By sitelink"), (3, "dewiki", "Seite 3"), (9, "frwiki", "Lost")]
    rows = [{"ips_row_id": n, "ips_item_id": n, "ips_site_id": w, "ips_site_page": t} for n, w, t in sites]
    write_sql(dumps, "wikidatawiki", "wb_items_per_site", rows)
    write_sql(dumps, "enwiki", "langlinks", [{"ll_from": 3, "ll_lang": "de", "ll_title": "Seite 3"}])
    report = build_documents(dumps, ("en", "de"), tmp_path / "out", 1)
    assert {(d.id, d.title) for d in documents(tmp_path / "out") if d.lang == "en"} == {
        ("Q1", "By props 1".removesuffix(" 1")),
        ("Q2", "By sitelink"),
        ("Q3", "By link"),
    }
    assert report["filters"]["en"]["no_item"] == 1


def test_a_cap_keeps_the_same_items_in_every_capped_wiki(tmp_path):
    for wiki in ("enwiki", "cebwiki", "warwiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(n, f"Q{n}") for n in range(1, 41)])
    filters = Filters(caps={"ceb": 10, "war": 10})
    report = build_documents(tmp_path / "dumps", ("en", "ceb", "war"), tmp_path / "out", 1, filters)
    assert [report["filters"][code]["over_cap"] for code in ("en", "ceb", "war")] == [0, 30, 30]
    kept = {code: {d.id for d in documents(tmp_path / "out") if d.lang == code} for code in ("ceb", "war")}
    assert len(kept["ceb"]) == 10 and kept["ceb"] == kept["war"]


def test_stub_templates_are_a_setting(tmp_path):
    for wiki in ("enwiki", "dewiki"):
        pages = [page(1, "Q1", template=["Template:Cycling-stub"]), page(2, "Q2", template=["Template:Infobox"])]
        write_cirrus(tmp_path / "dumps", wiki, pages)
    for number, (drop, stubs) in enumerate([(False, 0), (True, 1)]):
        filters = Filters(stub_templates=drop)
        report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / f"out{number}", 1, filters)
        assert report["filters"]["de"]["stub"] == stubs


def test_shares_of_steps_make_the_same_bytes_as_one_process(tmp_path):
    write_sample(tmp_path / "dumps")
    build_documents(tmp_path / "dumps", LANGUAGES, tmp_path / "whole", 1, EVERYTHING)
    arguments = (tmp_path / "dumps", LANGUAGES, tmp_path / "shared", 1, EVERYTHING)
    with pytest.raises(InputError, match="step sitelinks is not whole"):
        build_documents(*arguments, "extract", (0, 2))
    for step, many in STEPS.items():
        for share in range(2 if many else 1):
            try:
                build_documents(*arguments, step, (share, 2 if many else 1))
            except ShareDone:
                assert step != "finish"
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert not (tmp_path / "shared.partial").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(tmp_path):
    write_sample(tmp_path / "dumps")
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(n, f"Q{n}", category=[f"C{n % 7}"]) for n in range(400)], parts=4)

    def command(out):
        return [
            *(sys.executable, ROOT / "tools" / "build_documents.py", "wikipedia", "--dumps", tmp_path / "dumps"),
            *("--languages", "en,de,ja", "--workers", "2", "--out", out),
        ]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    seconds = time.monotonic() - began
    draw, killed, resumed = random.Random(5), 0, False
    for _ in range(10):
        job = subprocess.Popen(
            command(tmp_path / "out"), env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            # Starting Python takes most of the time; what is done grows with every attempt.
            job.wait(draw.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            killed += 1
        job.wait()
        resumed |= (tmp_path / "out.partial").exists()
        if (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists():
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
                path.unlink()
            (tmp_path / "out").rmdir()
    assert killed and resumed
    subprocess.run(command(tmp_path / "out"), env=environment(), check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_work_of_other_settings_is_not_continued(tmp_path):
    write_sample(tmp_path / "dumps")
    with pytest.raises(ShareDone):
        build_documents(tmp_path / "dumps", LANGUAGES, tmp_path / "out", 1, EVERYTHING, "sitelinks", (0, 1))
    with pytest.raises(InputError, match="unfinished build with other filters"):
        build_documents(tmp_path / "dumps", LANGUAGES, tmp_path / "out", 1)
    assert (tmp_path / "out.partial" / "sitelinks" / "00000").exists()


def test_a_page_that_the_dumps_hold_twice_is_kept_once(tmp_path):
    for wiki in ("enwiki", "dewiki"):
        write_cirrus(tmp_path / "dumps", wiki, [page(1, "Q1"), page(2, "Q2"), page(1, "Q1")])
    report = build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    assert sorted((d.id, d.lang) for d in documents(tmp_path / "out")) == [
        (item, lang) for item in ("Q1", "Q2") for lang in ("de", "en")
    ]
    assert report["filters"]["en"]["item_twice"] == 1


def test_the_page_dump_alone_does_not_make_tracking_categories_usable(tmp_path):
    pages = [page(n, f"Q{n}", category=["Articles with broken links", "Cats"]) for n in (1, 2)]
    both(tmp_path / "dumps", pages)
    category_tables(tmp_path / "dumps", "enwiki", {"Articles with broken links": None, "Cats": None})
    next((tmp_path / "dumps").rglob("enwiki-*-page_props.sql.gz")).unlink()
    build_documents(tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1)
    assert categories_of(tmp_path / "out") == {"Q1": ("en:Cats",), "Q2": ("en:Cats",)}


def test_steps_of_absent_dumps_and_of_no_step_are_answered(tmp_path):
    write_cirrus(tmp_path / "dumps", "enwiki", [page(1, "Q1")])
    write_cirrus(tmp_path / "dumps", "dewiki", [page(1, "Q1")])
    arguments = (tmp_path / "dumps", ("en", "de"), tmp_path / "out", 1, Filters())
    with pytest.raises(ShareDone):  # there is no wb_items_per_site: nothing to do, and no error
        build_documents(*arguments, "sitelinks", (0, 1))
    with pytest.raises(InputError, match="name the step with --step"):
        build_documents(*arguments, None, (1, 2))
    with pytest.raises(InputError, match="two languages or more"):
        build_documents(tmp_path / "dumps", ("en", "en"), tmp_path / "other", 1)


def test_what_a_kill_in_the_last_moment_leaves_is_cleaned_up(tmp_path):
    write_sample(tmp_path / "dumps")
    arguments = (tmp_path / "dumps", LANGUAGES, tmp_path / "out", 1, EVERYTHING)
    report = build_documents(*arguments)
    work, trash = tmp_path / "out.partial", tmp_path / ".out.trash-1"
    for folder in (work, trash):
        (folder / "extract").mkdir(parents=True)
    (work / "published").touch()
    (tmp_path / "out" / "result.json").touch()
    assert build_documents(*arguments) == json.loads(json.dumps(report))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dumps", "out"]
    assert not (tmp_path / "out" / "result.json").exists()
    work.mkdir()
    (work / "extract").mkdir()
    with pytest.raises(InputError, match="not the work of a build"):
        build_documents(
            tmp_path / "dumps", LANGUAGES, (tmp_path / "out").rename(tmp_path / "moved").with_name("out"), 1
        )


def test_a_plan_names_what_is_there_and_what_is_not(tmp_path):
    write_sample(tmp_path / "dumps")
    next((tmp_path / "dumps").rglob("jawiki-*-page.sql.gz")).unlink()
    lines = describe_plan(tmp_path / "dumps", LANGUAGES, 2).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["en", "de", "ja", "wikidata"]
    assert "SQL: all" in lines[0] and "SQL: without page" in lines[2]
    assert "with 2 processes" in lines[4]
