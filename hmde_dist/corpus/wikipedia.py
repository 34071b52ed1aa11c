"""Wikipedia dumps -> comparable documents: pages of one Wikidata item in several languages.

The steps (see `STEPS`; `corpus.steps` makes each of them resumable and spreads it over processes):

    sitelinks, facts, graph   SQL dumps -> one SQLite file a wiki, and the category graph over all of them
    extract                   each content dump -> filtered, split pages, dealt into buckets by their item
    select                    each wiki: duplicates, caps
    count, sizes, orphans, all_sizes   groups of every category, direct ones first, then their parents
    merge, finish             each bucket -> groups with their categories, written as documents

Every step takes constant memory but `select`, which holds about 70 bytes a page of one wiki. Neither the number of processes
nor their order changes a byte of the result.

Owns the filters (every drop is counted, per language) and the choice of a group's categories. Refuses wikis that are no
Wikipedia; keeps what a damaged file holds before the damage, and says so.
"""

import gzip
import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.buckets import Dealer, buckets_for, read_bucket
from hmde_dist.corpus.cirrus import Dumps, Page, find_dumps, language_of, read_pages
from hmde_dist.corpus.documents import SPLITS, Document, split_of
from hmde_dist.corpus.duplicates import REASONS, choose_left_out, describe
from hmde_dist.corpus.facts import (
    TABLES,
    WikiFacts,
    ancestors,
    size_of,
    write_facts,
    write_graph,
    write_sitelinks,
    write_sizes,
)
from hmde_dist.corpus.sentences import sentence_splitter, splitter_version
from hmde_dist.corpus.steps import Build, file_facts

# Each step, and whether it has many tasks.
STEPS = {
    "sitelinks": False, "facts": True, "graph": False, "extract": True, "select": True, "count": True, "sizes": False,
    "orphans": True, "all_sizes": False, "merge": True, "finish": False,
}  # fmt: skip
FILTERS = ("namespace", "redirect", "no_item", "disambiguation", "list", "stub", "wrong_script", *REASONS)
SMALLEST_CATEGORY, LARGEST_CATEGORY = 2, 2000  # groups; a category of more says little
PARENT_STEPS = 2
# Bytes of dumps a second of one process, and bytes of work for each, by tools/bench_corpus.py: see docs/benchmarks.md.
CONTENT_RATE, SQL_RATE, TEXT_SHARE = 3.4e6, 6.0e6, 0.6

# The script most letters of a page must have, by language; other languages are not checked.
_SCRIPTS = {
    "CYRILLIC": "ru uk be bg sr mk kk ky tg mn ba tt cv os ce".split(),
    "ARABIC": "ar fa ur ps arz ckb sd ug".split(),
    "DEVANAGARI": "hi mr ne sa bh new mai".split(),
    "HANGUL": ["ko"],
    "GREEK": ["el"],
    "HEBREW": ["he", "yi"],
    "THAI": ["th"],
    "GEORGIAN": ["ka", "xmf"],
    "ARMENIAN": ["hy", "hyw"],
    "BENGALI": ["bn", "as"],
    "TAMIL": ["ta"],
    "LATIN": "en de fr es it pt nl sv pl cs da fi hu no nn ro tr vi id ms ca eu hr sk sl lt lv et".split(),
}
_SCRIPT_OF = {language: script for script, languages in _SCRIPTS.items() for language in languages}
# What the search index leaves of a reference list: two spaces and a caret, to the end.
_REFERENCES = re.compile(r" {2}\^ .*", re.DOTALL)
_LIST_TITLE = re.compile(
    r"(Lists?|Liste[ns]?|Listado|Lista|Lijst|Lijsten|Elenco|Seznam|Zoznam|Luettelo|Danh sách|Daftar|Senarai) "
    r"(of|der|des|du|von|de|di|dei|delle|degli|del|van|över|over)\b|Список |Спис |Списък |Списак |Κατάλογος |قائمة |فهرست "
    r"|רשימת |.*の一覧|.*列表$|.* 목록$|.* की सूची|.* তালিকা|รายชื่อ",
    re.IGNORECASE,
)


# Pages written by bots, in numbers that would drown what people wrote.
BOT_WIKIS = {"ceb": 500_000, "war": 500_000, "sv": 1_000_000, "arz": 500_000}
_STUB_TEMPLATE = re.compile(
    r"stub|ébauche|abbozzo|esbo[çz]o|заготовка|beginnetje|zalążek|スタブ|小作品|قالب:بذرة", re.IGNORECASE
)


@dataclass(frozen=True)
class Filters:
    """What is dropped, and what is kept of a page.

    Attributes:
        min_sentences: pages of fewer are stubs.
        min_characters: and so are pages of fewer characters.
        stub_templates: drop pages that bear a stub template, too.
        max_sentences: of a page that are kept, from its beginning.
        script_share: letters of the first sentences that must be in the script of the language.
        caps: most pages of a language.
        splitter: "rules" or "icu", see `corpus.sentences`.
    """

    min_sentences: int = 5
    min_characters: int = 100
    stub_templates: bool = False
    max_sentences: int = 64
    script_share: float = 0.5
    caps: Mapping[str, int] = field(default_factory=lambda: dict(BOT_WIKIS))
    splitter: str = "rules"


def build_documents(
    dumps_folder: Path,
    languages: Sequence[str],
    out: Path,
    workers: int,
    filters: Filters = Filters(),
    only: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict:
    """Build `train|validation|test.jsonl.gz` and `report.json` under `out` from the dumps below `dumps_folder`.

    A build that was stopped goes on where it stood. Returns the report: per language what each filter dropped and what
    was kept, the problems of damaged files, the sources with their checksums, the groups and documents of every split.

    Args:
        only, share: see `corpus.steps.Build`.

    Raises:
        InputError: a language has no dump, or no item occurs in two of the languages.
        ShareDone: the share of step `only` is done.
    """
    try:
        version = splitter_version(filters.splitter)
    except ValueError as error:
        raise InputError(f"--splitter: {error}") from None
    dumps = find_dumps(dumps_folder)
    wikis = _wikis_of(dumps, languages, dumps_folder)
    contents = [(language, path) for language, wiki in wikis.items() for path in dumps.wikis[wiki]]
    tables = {language: _tables_of(dumps, wiki) for language, wiki in wikis.items()}
    sitelinks = dumps.sql.get("wikidatawiki", {}).get("wb_items_per_site")
    files = [path for _, path in contents] + [path for of_wiki in tables.values() for path in of_wiki.values()]
    files += [sitelinks] if sitelinks else []
    settings = {
        "languages": list(wikis),
        "filters": asdict(filters),
        "dumps": file_facts(files),
        "splitter": version,
    }
    with Build(out, settings, workers, only, share) as build:
        if build.complete:
            return json.loads((out / "report.json").read_text(encoding="utf-8"))
        problems = []
        asked = [(sitelinks, list(wikis.values()))] if sitelinks else []
        problems += build.run("sitelinks", write_sitelinks, asked)
        links = build.folder("sitelinks", 0) / "sitelinks.sqlite" if sitelinks else None
        problems += build.run("facts", write_facts, [(wiki, tables[code], links) for code, wiki in wikis.items()])
        facts = {code: build.folder("facts", number) / "facts.sqlite" for number, code in enumerate(wikis)}
        build.run("graph", write_graph, [(facts,)])
        graph = build.folder("graph", 0) / "graph.sqlite"
        # Compressed dumps grow five times, a seventh of that is text, and one part in five comes to nothing.
        buckets = buckets_for(sum(path.stat().st_size for _, path in contents))
        extracted = build.run("extract", _extract, [(path, code, facts, buckets, filters) for code, path in contents])
        parts = {code: [] for code in wikis}
        for number, (code, _) in enumerate(contents):
            parts[code].append(build.folder("extract", number))
        selected = build.run("select", choose_left_out, [(parts[code], filters.caps.get(code)) for code in wikis])
        left_out = {code: build.folder("select", number) / "left_out.npy" for number, code in enumerate(wikis)}
        folders = [folder for of_wiki in parts.values() for folder in of_wiki]
        build.run("count", _count, [(folders, number, left_out) for number in range(buckets)])
        counted = [build.folder("count", number) for number in range(buckets)]
        build.run("sizes", write_sizes, [([folder / "sizes.txt" for folder in counted],)])
        sizes = build.folder("sizes", 0) / "sizes.sqlite"
        build.run("orphans", _count_orphans, [(folder / "keys.jsonl", sizes, graph) for folder in counted])
        orphans = [build.folder("orphans", number) / "sizes.txt" for number in range(buckets)]
        build.run("all_sizes", write_sizes, [([folder / "sizes.txt" for folder in counted] + orphans,)])
        all_sizes = build.folder("all_sizes", 0) / "sizes.sqlite"
        choice = (sizes, all_sizes, graph)
        merged = build.run("merge", _merge, [(folders, number, left_out, choice) for number in range(buckets)])
        report = _report(list(wikis), contents, extracted, selected, merged)
        if not report["groups"]:
            raise InputError(f"{dumps_folder}: no Wikidata item has a page in two of {', '.join(wikis)}")
        report |= {
            "problems": [line for lines in problems for line in lines]
            + [line for part in extracted for line in part["problems"]],
            "notes": dumps.notes,
            "settings": {key: settings[key] for key in ("languages", "filters", "splitter")},
            "sources": [part["source"] for part in extracted],
        }
        build.finish(_finish, ([build.folder("merge", number) for number in range(buckets)], report))
    return report


def _tables_of(dumps: Dumps, wiki: str) -> dict[str, Path]:
    return {table: path for table, path in dumps.sql.get(wiki, {}).items() if table in TABLES}


def _wikis_of(dumps: Dumps, languages: Sequence[str], folder: Path) -> dict[str, str]:
    """The wiki of each language."""
    available = {}
    for wiki in dumps.wikis:
        try:
            available[language_of(wiki)] = wiki
        except InputError as error:
            dumps.notes.append(f"{wiki}: left out, {error}")
    missing = [language for language in languages if language not in available]
    if missing:
        found = ", ".join(sorted(available)) or "none"
        raise InputError(f"{folder}: no content dump for {', '.join(missing)}; there are dumps for: {found}")
    if len(set(languages)) < 2:
        raise InputError("--languages: comparable documents need two languages or more")
    return {language: available[language] for language in dict.fromkeys(languages)}


def describe_plan(dumps_folder: Path, languages: Sequence[str], workers: int) -> str:
    """What a build would read, make and take, from the sizes of the files alone."""
    dumps = find_dumps(dumps_folder)
    wikis = _wikis_of(dumps, languages, dumps_folder)
    lines, content, sql = [], 0, 0
    for language, wiki in wikis.items():
        tables = _tables_of(dumps, wiki)
        size = sum(path.stat().st_size for path in dumps.wikis[wiki])
        content, sql = content + size, sql + sum(path.stat().st_size for path in tables.values())
        absent = ", ".join(table for table in TABLES if table not in tables)
        lines.append(
            f"{language:<10} {len(dumps.wikis[wiki]):>4} files {size / 2**20:>10,.1f} MiB   SQL: "
            + (f"without {absent}" if absent else "all")
        )
    sitelinks = dumps.sql.get("wikidatawiki", {}).get("wb_items_per_site")
    sql += sitelinks.stat().st_size if sitelinks else 0
    lines.append(f"wikidata   {'wb_items_per_site' if sitelinks else 'without wb_items_per_site'}")
    hours = (content / CONTENT_RATE + sql / SQL_RATE) / workers / 3600
    lines.append(
        f"to read: {content / 2**20:,.1f} MiB of pages, {sql / 2**20:,.1f} MiB of SQL; work beside --out: about "
        f"{content * TEXT_SHARE / 2**20:,.0f} MiB; about {hours:,.2f} h with {workers} processes"
    )
    return "\n".join(lines + dumps.notes)


def _extract(
    folder: Path, path: Path, language: str, facts_of: Mapping[str, Path], buckets: int, filters: Filters
) -> dict:
    """Step: the pages of one dump file that pass the filters, dealt into buckets, and a row for each in `pages.bin`."""
    facts = WikiFacts(facts_of[language], language, facts_of)
    counts: Counter = Counter()
    problems: list[str] = []
    dealer = Dealer(folder, buckets)
    split_sentences = sentence_splitter(filters.splitter)
    rows, signatures = open(folder / "pages.bin", "wb"), open(folder / "signatures.bin", "wb")
    for page in read_pages(path, problems):
        counts["pages"] += 1
        item = page.item if re.fullmatch("Q[0-9]{1,18}", page.item) else facts.item_of(page.page_id, page.title)
        fault = _fault_of_page(page, item, facts, filters)
        sentences = [] if fault else split_sentences(_REFERENCES.sub("", page.text), language)
        fault = fault or _fault_of_text(sentences, language, filters)
        if fault:
            counts[fault] += 1
            continue
        kept = sentences[: filters.max_sentences]
        row, signature = describe(page.page_id, item, kept)
        rows.write(row.tobytes())
        signatures.write(signature.tobytes())
        record = {
            "item": item,
            "page": page.page_id,
            "lang": language,
            "title": page.title,
            "sentences": kept,
            "categories": sorted({facts.category_key(name) for name in page.categories} - {""}),
            "topic": page.topics[0] if page.topics else "",
        }
        dealer.deal(item, json.dumps(record, ensure_ascii=False).encode() + b"\n")
    for file in (dealer, rows, signatures):
        file.close()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
    return {"counts": counts, "problems": problems, "source": source}


def _fault_of_page(page: Page, item: str, facts: WikiFacts, filters: Filters) -> str:
    """The first filter that the facts of a page do not pass, or ""."""
    if page.namespace != 0:
        return "namespace"
    if page.is_redirect:
        return "redirect"
    if not item:
        return "no_item"
    if facts.is_disambiguation(page.page_id):
        return "disambiguation"
    if _LIST_TITLE.match(page.title):
        return "list"
    return "stub" if filters.stub_templates and any(map(_STUB_TEMPLATE.search, page.templates)) else ""


def _fault_of_text(sentences: Sequence[str], language: str, filters: Filters) -> str:
    if len(sentences) < filters.min_sentences or sum(map(len, sentences)) < filters.min_characters:
        return "stub"
    script = _SCRIPT_OF.get(language.split("-")[0])
    # Letters of the first sentences are enough to tell.
    letters = [letter for letter in "".join(sentences[:8])[:400] if letter.isalpha()]
    if script and sum(unicodedata.name(letter, "").startswith(script) for letter in letters) < (
        filters.script_share * len(letters)
    ):
        return "wrong_script"
    return ""


def _parse(line: bytes) -> tuple[str, dict]:
    record = json.loads(line)
    return record["item"], record


def _groups(parts: Sequence[Path], bucket: int, left_out: Mapping[str, Path]) -> Iterator[tuple[str, list[dict]]]:
    """(item, records by language) of a bucket, without the pages that are left out; groups of one language, too."""
    dropped = {language: np.load(path) for language, path in left_out.items()}
    for item, records in read_bucket(parts, bucket, _parse):
        # By language: a page that the dumps hold twice comes once.
        kept = {r["lang"]: r for r in reversed(records) if not _contains(dropped[r["lang"]], r["page"])}
        if kept:
            yield item, [kept[language] for language in sorted(kept)]


def _contains(numbers: np.ndarray, number: int) -> bool:
    place = np.searchsorted(numbers, np.uint64(number))
    return place < len(numbers) and numbers[place] == number


def _keys(versions: Iterable[Mapping]) -> list[str]:
    return sorted({key for record in versions for key in record["categories"]})


def _write_counts(path: Path, counts: Counter) -> None:
    path.write_text("".join(f"{number}\t{key}\n" for key, number in sorted(counts.items())), encoding="utf-8")


def _count(folder: Path, parts: Sequence[Path], bucket: int, left_out: Mapping[str, Path]) -> None:
    """Step: the categories of each group of a bucket, and how many of these groups each category has."""
    sizes: Counter = Counter()
    with open(folder / "keys.jsonl", "w", encoding="utf-8") as file:
        for _, versions in _groups(parts, bucket, left_out):
            if len(versions) > 1:
                keys = _keys(versions)
                sizes.update(keys)
                file.write(json.dumps(keys, ensure_ascii=False) + "\n")
    _write_counts(folder / "sizes.txt", sizes)


def _usable(sizes: Path, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are neither too small nor too large, the largest first."""
    found = [(size_of(sizes, key), key) for key in keys]
    return [key for size, key in sorted(found, reverse=True) if SMALLEST_CATEGORY <= size <= LARGEST_CATEGORY]


def _count_orphans(folder: Path, keys_file: Path, sizes: Path, graph: Path) -> None:
    """Step: for the groups without a usable category, how many of them are below each parent."""
    above: Counter = Counter()
    with open(keys_file, encoding="utf-8") as lines:
        for line in lines:
            keys = json.loads(line)
            if not _usable(sizes, keys):
                above.update(key for level in ancestors(graph, keys, PARENT_STEPS) for key in level)
    _write_counts(folder / "sizes.txt", above)


def choose_categories(versions: Iterable[Mapping], sizes: Path, all_sizes: Path, graph: Path) -> list[str]:
    """The categories of a group, the most specific one last: its usable ones, else one parent, else its topic.

    Args:
        sizes: groups of each category; all_sizes: with those below it that have no usable category of their own.
    """
    versions = list(versions)
    keys = _keys(versions)
    if usable := _usable(sizes, keys):
        return usable
    for level in (keys, *ancestors(graph, keys, PARENT_STEPS)):
        if usable := _usable(all_sizes, level):
            return usable[-1:]
    return [topic] if (topic := topic_of(versions)) else []


def topic_of(versions: Iterable[Mapping]) -> str:
    """The most frequent topic of a group's versions, or ""."""
    topics = Counter(record["topic"] for record in versions if record["topic"])
    return min(topics, key=lambda topic: (-topics[topic], topic), default="")


def _merge(
    folder: Path, parts: Sequence[Path], bucket: int, left_out: Mapping[str, Path], choice: tuple[Path, Path, Path]
) -> dict:
    """Step: the groups of one bucket as documents, one file a split; returns their counts."""
    report = {"one_language": 0, "groups": Counter(), "documents": {split: Counter() for split in SPLITS}}
    files = {split: gzip.GzipFile(folder / f"{split}.jsonl.gz", "wb", compresslevel=6, mtime=0) for split in SPLITS}
    for item, versions in _groups(parts, bucket, left_out):
        if len(versions) < 2:
            report["one_language"] += 1
            continue
        split = split_of(item)
        categories, topic = tuple(choose_categories(versions, *choice)), topic_of(versions)
        report["groups"][split] += 1
        for record in versions:
            document = Document(
                item, record["lang"], record["title"], sentences=tuple(record["sentences"]), categories=categories
            )
            line = document.as_json(**({"topic": topic} if topic else {}))
            files[split].write((line + "\n").encode())
            report["documents"][split][record["lang"]] += 1
    for file in files.values():
        file.close()
    return report


def _report(languages: list[str], contents: list, extracted: list[dict], selected: list[dict], merged: list) -> dict:
    counts = {language: Counter() for language in languages}
    for (language, _), part in zip(contents, extracted, strict=True):
        counts[language].update(part["counts"])
    for language, part in zip(languages, selected, strict=True):
        counts[language].update(part)
    splits = {}
    for split in SPLITS:
        documents = sum((Counter(part["documents"][split]) for part in merged), Counter())
        groups = sum(part["groups"].get(split, 0) for part in merged)
        splits[split] = {"groups": groups, "documents": dict(sorted(documents.items()))}
    return {
        "groups": sum(split["groups"] for split in splits.values()),
        "left_out_one_language": sum(part["one_language"] for part in merged),
        "splits": splits,
        "filters": {language: {"pages": c["pages"]} | {f: c[f] for f in FILTERS} for language, c in counts.items()},
    }


def _finish(folder: Path, parts: Sequence[Path], report: dict) -> None:
    """Step: the files of the buckets, one after the other (members of a gzip file may follow each other)."""
    for split in SPLITS:
        with open(folder / f"{split}.jsonl.gz", "wb") as whole:
            for part in parts:
                with open(part / f"{split}.jsonl.gz", "rb") as file:
                    shutil.copyfileobj(file, whole)
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
