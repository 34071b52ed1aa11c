"""The dumps that the bench makes: the same every time, read without a problem, with every kind of page, consistent."""

import bz2
import gzip
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import PROGRAMS, ROOT, finish, start

from hmde_dist.corpus.cirrus import Dumps, Page, find_dumps, read_pages
from hmde_dist.corpus.sql_dump import read_rows

sys.path.insert(0, str(ROOT / "tools"))
import bench_corpus

from made_up_wikipedias.tables import TABLES

PAGES, LANGUAGES = 1500, ("en", "de", "ja")
COLUMNS = {
    "page": ("page_id", "page_namespace", "page_title", "page_is_redirect", "page_latest", "page_lang"),
    "page_props": ("pp_page", "pp_propname", "pp_value", "pp_sortkey"),
    "categorylinks": ("cl_from", "cl_type", "cl_sortkey", "cl_timestamp", "cl_to?", "cl_target_id?"),
    "linktarget": ("lt_id", "lt_namespace", "lt_title"),
    "langlinks": ("ll_from", "ll_lang", "ll_title"),
    "wb_items_per_site": ("ips_row_id", "ips_item_id", "ips_site_id", "ips_site_page"),
}


def generate(out: Path, *options: str) -> Path:
    asked = ["--pages", PAGES, "--languages", ",".join(LANGUAGES), "--out", out, *options]
    job = finish(start([PROGRAMS / "python", ROOT / "tools" / "bench_corpus.py", "generate", *asked]))
    assert job.code == 0, job.output
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("bench") / "dumps")


@pytest.fixture(scope="module")
def dumps(folder) -> Dumps:
    return find_dumps(folder)


@pytest.fixture(scope="module")
def pages(dumps) -> dict[str, list[Page]]:
    problems: list[str] = []
    found = {wiki: [page for path in paths for page in read_pages(path, problems)] for wiki, paths in dumps.wikis.items()}  # fmt: skip
    assert problems == []
    return found


def rows(dumps: Dumps, wiki: str, table: str) -> Iterator[list[str | None]]:
    """The columns of `COLUMNS` as text; sort keys, which are none, with their bytes as letters."""
    problems: list[str] = []
    for row in read_rows(dumps.sql[wiki][table], table, COLUMNS[table], problems):
        yield [value if value is None else value.decode("latin-1" if i == 2 and table == "categorylinks" else "utf-8")
               for i, value in enumerate(row)]  # fmt: skip
    assert problems == []


def props(dumps: Dumps, wiki: str, name: str) -> dict[int, str]:
    return {int(page): value for page, key, value, _ in rows(dumps, wiki, "page_props") if key == name}


def targets(dumps: Dumps, wiki: str) -> dict[str, str]:
    return {row: title for row, space, title in rows(dumps, wiki, "linktarget") if space == "14"}


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    def files(base: Path) -> dict[str, bytes]:
        return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}

    assert files(folder) == files(generate(tmp_path / "again"))
    assert "20260816/index_name=jawiki_content/_SUCCESS" in files(folder)


def test_every_table_is_there_and_read_whole(dumps):
    expected = {f"{language}wiki": set(TABLES) for language in LANGUAGES}
    assert {wiki: set(tables) for wiki, tables in dumps.sql.items()} == expected | {
        "wikidatawiki": {"wb_items_per_site"}
    }
    assert dumps.notes == []
    for wiki, tables in dumps.sql.items():
        for table in tables:
            assert sum(1 for _ in rows(dumps, wiki, table)) > 200, (wiki, table)
    layouts = {}
    for wiki in expected:
        *_, name, target = next(rows(dumps, wiki, "categorylinks"))
        text = gzip.decompress(dumps.sql[wiki]["categorylinks"].read_bytes())
        layouts[wiki] = (name is not None, target is not None, b"VALUES\n(" in text)
    assert layouts == {"enwiki": (False, True, True), "dewiki": (True, False, False), "jawiki": (True, True, True)}


def test_every_kind_of_page_is_there(dumps, pages):
    sitelinks = defaultdict(set)
    for _, item, site, title in rows(dumps, "wikidatawiki", "wb_items_per_site"):
        sitelinks[site].add((title, f"Q{item}"))
    for wiki, found in pages.items():
        assert 0.2 * PAGES < len(found) < 0.6 * PAGES and len({page.page_id for page in found}) == len(found)
        assert len({(page.namespace, page.title) for page in found}) == len(found)
        assert {page.namespace for page in found} == {0, 100}
        assert any(page.is_redirect for page in found) and any("  ^ " in page.text for page in found)
        articles = [page for page in found if page.namespace == 0 and not page.is_redirect]
        list_word = {"enwiki": "List of ", "dewiki": "Liste der ", "jawiki": "の一覧"}[wiki]
        assert any(list_word in page.title for page in articles)
        assert any(not page.text for page in articles) and any(0 < len(page.text) < 150 for page in articles)
        texts = Counter(page.text for page in articles if len(page.text) > 100)
        assert max(texts.values()) > 1
        twice = Counter(page.item for page in articles if page.item)
        assert max(twice.values()) == 2
        disambiguation = props(dumps, wiki, "disambiguation")
        assert any(page.page_id in disambiguation for page in articles)
        items, linked = props(dumps, wiki, "wikibase_item"), dict(sitelinks[wiki])
        without = [page for page in articles if not page.item]
        assert any(page.page_id in items for page in without)
        assert any(page.page_id not in items and page.title in linked for page in without)
        assert any(page.title not in linked for page in without)
        assert all(items[page.page_id] == page.item for page in articles if page.item)
        assert all((page.title, page.item) in sitelinks[wiki] for page in articles if twice[page.item] == 1)
    # The bot's pages: other titles and texts, but half of the sentences are those of another page.
    counted = Counter(sentence for page in pages["dewiki"] for sentence in set(page.text.split(". ")))
    assert counted.most_common(4)[3][1] > 10
    languages = Counter(item for found in pages.values() for item in {page.item for page in found if page.item})
    assert set(languages.values()) == {1, 2, 3}


def test_content_and_tables_tell_the_same(dumps, pages):
    titles = {}
    for wiki in pages:
        listed = {int(row[0]): row[1:4] for row in rows(dumps, wiki, "page")}
        assert all(
            listed[page.page_id] == [str(page.namespace), page.title.replace(" ", "_"), str(int(page.is_redirect))]
            for page in pages[wiki]
        )
        titles[wiki] = {title.replace("_", " ") for space, title, _ in listed.values() if space == "0"}
        names = targets(dumps, wiki)
        members = defaultdict(set)
        for page, kind, *_, name, target in rows(dumps, wiki, "categorylinks"):
            assert kind == ("subcat" if listed[int(page)][0] == "14" else "page")
            assert name is None or target is None or names[target] == name
            members[int(page)].add((name or names[target]).replace("_", " "))
        assert all(set(page.categories) == members[page.page_id] for page in pages[wiki])
        counts = Counter(len(page.categories) for page in pages[wiki] if page.text and not page.namespace)
        assert min(counts) == 1 and 6 < max(counts) <= 11
    for wiki in pages:
        links = [(lang, title) for _, lang, title in rows(dumps, wiki, "langlinks") if "ategor" not in title]
        assert links and all(title in titles[f"{lang}wiki"] for lang, title in links)


def test_categories_have_parents_and_cycles_and_some_are_hidden(dumps, pages):
    names = targets(dumps, "enwiki")
    ids = {title: int(page) for page, space, title, *_ in rows(dumps, "enwiki", "page") if space == "14"}
    hidden = props(dumps, "enwiki", "hiddencat")
    above = defaultdict(set)
    for page, kind, *_, target in rows(dumps, "enwiki", "categorylinks"):
        if kind == "subcat":
            above[int(page)].add(ids.get(names[target]))
    assert sum(len(parents) > 1 for parents in above.values()) > 20
    assert any(page in above[parent] for page, parents in list(above.items()) for parent in parents if parent in above)
    used = Counter(ids.get(name.replace(" ", "_")) for page in pages["enwiki"] for name in page.categories)
    assert None in used  # categories without a page
    assert any(page in hidden for page in used)
    sizes = sorted(used.values(), reverse=True)
    assert sizes[0] > 10 * sizes[len(sizes) // 2]


def test_records_have_the_proportions_of_real_ones(folder):
    (path, *_) = sorted(folder.glob("*/index_name=enwiki_content/*.bz2"))
    lines = bz2.decompress(path.read_bytes()).splitlines()
    records = [json.loads(line) for line in lines[1::2]]
    size = sum(map(len, lines))
    assert 0.12 < sum(len(record.get("text", "").encode()) for record in records) / size < 0.18
    assert 0.28 < sum(len(record.get("source_text", "").encode()) for record in records) / size < 0.38
    assert {"outgoing_link", "auxiliary_text", "template", "external_link", "weighted_tags"} <= records[0].keys() | records[1].keys()  # fmt: skip


def test_documents_are_built_from_them(folder, tmp_path):
    asked = ["--dumps", folder, "--languages", ",".join(LANGUAGES), "--out", tmp_path / "out", "--workers", "2"]
    job = finish(start([PROGRAMS / "python", ROOT / "tools" / "build_documents.py", "wikipedia", *asked]))
    assert job.code == 0, job.output
    with gzip.open(tmp_path / "out" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        counts = Counter(json.loads(line)["lang"] for line in lines)
    assert set(counts) == set(LANGUAGES) and min(counts.values()) > 20


def test_a_command_is_measured_with_its_children(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.7: pass"
    outer = f"import subprocess, sys; block = b'x' * 10**8; subprocess.run([sys.executable, '-c', {busy!r}])"
    wall, cpu, peak = bench_corpus.measure("busy", ["-c", outer], tmp_path / "log")
    assert wall > 0.7 and cpu > 0.7 and 10**8 < peak < 3 * 10**8


def test_a_failure_shows_the_output_of_the_command(folder, tmp_path, capsys):
    assert bench_corpus.run(folder, ["en", "fr"], tmp_path / "out", 2) == 1
    output = capsys.readouterr().out
    assert "no content dump for fr" in output and output.endswith("build_documents ended with exit code 2\n")


def test_the_report_holds_the_lines_of_steps():
    step = "step extract: 12 tasks, 34.5 s, peak 210 MiB"
    build = bench_corpus.Measured("build_documents", 100.0, 180.0, 2**28, 70_100, 10**8, 2, [step])
    other = bench_corpus.Measured("build_shards", 36.0, 36.0, 2**27, 1000, 10**6, 0, [])
    text = bench_corpus.report_text([build, other, other], 10**8, "closing")
    assert f"\nbuild_documents: {step}\n" in text
    totals = [line.split("|")[1:-1] for line in text.partition("core hours")[2].splitlines()]
    hours = {row[0].strip(): [float(cell.replace(",", "")) for cell in row[1:]] for row in totals[2:4]}
    assert hours == {"build_documents": [50, 56, 27.78, 0.87, 0.11], "build_shards": [10, 10, 10, 10, 10]}
