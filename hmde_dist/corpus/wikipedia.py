"""Wikipedia dumps -> comparable documents: pages of one Wikidata item in several languages.

Two stages, each in parallel and each in constant memory. *Extract* reads every dump file once, filters and splits its
pages and deals them by their item into buckets. *Merge* reads one bucket at a time, in which all versions of an item
now lie together, and writes its groups. Neither the number of processes nor their order changes a byte of the result.

Owns the filters (every drop is counted, per language) and the choice of a group's category. Refuses wikis that are no
Wikipedia; keeps what a damaged file holds before the damage, and says so.
"""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmde_dist.command import InputError, output_folder, progress
from hmde_dist.corpus.cirrus import Dumps, Page, find_dumps, language_of, read_pages
from hmde_dist.corpus.documents import SPLITS, Document, split_of
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.sql_dump import read_rows

FILTERS = ("namespace", "redirect", "no_item", "disambiguation", "list", "short", "wrong_script", "item_twice")
BUCKET_BYTES = 64 << 20  # of text, about
CATEGORY_NAMESPACE = b"14"
LARGEST_CATEGORY = 2000  # groups; a category of more says little

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
_LIST_TITLE = re.compile(r"List(s|e|a)? (of|der|des|von|de|di|dei|delle|degli|van) ", re.IGNORECASE)


@dataclass(frozen=True)
class Filters:
    """What is dropped, and what is kept of a page."""

    min_sentences: int = 5
    max_sentences: int = 64
    script_share: float = 0.5


@dataclass(frozen=True)
class WikiFacts:
    """What the SQL dumps of one wiki say; empty where there are none.

    Attributes:
        categories: Wikidata item of a category by its title with spaces.
        hidden: titles of hidden (maintenance) categories.
        disambiguation: page ids of disambiguation pages.
    """

    categories: dict[str, str]
    hidden: frozenset[str]
    disambiguation: frozenset[int]


def build_documents(
    dumps_folder: Path, languages: Sequence[str], out: Path, workers: int, filters: Filters = Filters()
) -> dict:
    """Build `train|validation|test.jsonl.gz` and `report.json` under `out` from the dumps below `dumps_folder`.

    Returns the report: per language what each filter dropped and what was kept, the problems of damaged files, and the
    groups and documents of every split.

    Raises:
        InputError: a language has no dump, or no item occurs in two of the languages.
    """
    dumps = find_dumps(dumps_folder)
    wikis = _wikis_of(dumps, languages, dumps_folder)
    with output_folder(out) as folder:
        work = folder / "work"
        parts = [(wiki, path) for wiki in wikis.values() for path in dumps.wikis[wiki]]
        # Compressed text grows about five times.
        buckets = max(1, 5 * sum(path.stat().st_size for _, path in parts) // BUCKET_BYTES)
        problems: list[str] = []
        codes = {wiki: language for language, wiki in wikis.items()}
        _FACTS.clear()
        _FACTS.update({codes[wiki]: read_wiki_facts(dumps.sql.get(wiki, {}), problems) for wiki in codes})
        tasks = [
            (path, codes[wiki], work / f"part-{number:05d}", buckets, filters)
            for number, (wiki, path) in enumerate(parts)
        ]
        counts: dict[str, Counter] = {language: Counter() for language in wikis}
        for (wiki, _), (found, damage) in zip(parts, _parallel(_extract, tasks, workers, "extract"), strict=True):
            counts[codes[wiki]].update(found)
            problems += damage
        runs = [[part / f"{bucket:05d}.jsonl" for _, _, part, _, _ in tasks] for bucket in range(buckets)]
        sizes: Counter = Counter()
        for found in _parallel(_category_sizes, runs, workers, "count"):
            sizes.update(found)
        merged = list(
            _parallel(_merge, [(run, work / f"merged-{i:05d}", sizes) for i, run in enumerate(runs)], workers, "merge")
        )
        report = _report(dumps, counts, problems, merged)
        for split in SPLITS:
            with open(folder / f"{split}.jsonl.gz", "wb") as whole:
                # Members of a gzip file may follow each other.
                for number in range(buckets):
                    with open(work / f"merged-{number:05d}" / f"{split}.jsonl.gz", "rb") as part:
                        shutil.copyfileobj(part, whole)
        if not report["groups"]:
            raise InputError(f"{dumps_folder}: no Wikidata item has a page in two of {', '.join(wikis)}")
        shutil.rmtree(work)
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


_FACTS: dict[str, WikiFacts] = {}  # by language; set before processes are forked


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
    return {language: available[language] for language in dict.fromkeys(languages)}


def read_wiki_facts(tables: dict[str, Path], problems: list[str]) -> WikiFacts:
    """Category items, hidden categories and disambiguation pages, from `page_props` and, for titles, `page`."""
    items: dict[int, str] = {}
    hidden_ids, disambiguation = set(), set()
    if "page_props" in tables:
        for page, name, value in read_rows(
            tables["page_props"], "page_props", ("pp_page", "pp_propname", "pp_value"), problems
        ):
            if name == b"wikibase_item":
                items[int(page)] = value.decode()
            elif name == b"hiddencat":
                hidden_ids.add(int(page))
            elif name == b"disambiguation":
                disambiguation.add(int(page))
    categories, hidden = {}, set()
    if "page" in tables:
        for page, namespace, title in read_rows(
            tables["page"], "page", ("page_id", "page_namespace", "page_title"), problems
        ):
            if namespace == CATEGORY_NAMESPACE:
                name = title.decode(errors="replace").replace("_", " ")
                if int(page) in items:
                    categories[name] = items[int(page)]
                if int(page) in hidden_ids:
                    hidden.add(name)
    return WikiFacts(categories, frozenset(hidden), frozenset(disambiguation))


def _extract(task: tuple) -> tuple[Counter, list[str]]:
    """Deal the pages of one dump file into buckets; returns counts per filter and problems."""
    path, language, folder, buckets, filters = task
    facts = _FACTS[language]
    counts: Counter = Counter()
    problems: list[str] = []
    with output_folder(folder) as parts:
        files = [open(parts / f"{number:05d}.jsonl", "w", encoding="utf-8") for number in range(buckets)]
        for page in read_pages(path, problems):
            counts["pages"] += 1
            sentences = [] if _fault_of_page(page, facts) else split_sentences(_REFERENCES.sub("", page.text), language)
            fault = _fault_of_page(page, facts) or _fault_of_text(sentences, language, filters)
            if fault:
                counts[fault] += 1
                continue
            record = {
                "item": page.item,
                "page": page.page_id,
                "lang": language,
                "title": page.title,
                "sentences": sentences[: filters.max_sentences],
                "categories": [
                    facts.categories.get(name, f"{language}:{name}")
                    for name in page.categories
                    if name not in facts.hidden
                ],
                "topic": page.topics[0] if page.topics else "",
            }
            files[zlib.crc32(page.item.encode()) % buckets].write(json.dumps(record, ensure_ascii=False) + "\n")
        for file in files:
            file.close()
    return counts, problems


def _fault_of_page(page: Page, facts: WikiFacts) -> str:
    """The first filter that the facts of a page do not pass, or ""."""
    if page.namespace != 0:
        return "namespace"
    if page.is_redirect:
        return "redirect"
    if not page.item:
        return "no_item"
    if page.page_id in facts.disambiguation:
        return "disambiguation"
    return "list" if _LIST_TITLE.match(page.title) else ""


def _fault_of_text(sentences: Sequence[str], language: str, filters: Filters) -> str:
    if len(sentences) < filters.min_sentences:
        return "short"
    script = _SCRIPT_OF.get(language.split("-")[0])
    # Letters of the first sentences are enough to tell.
    letters = [letter for letter in "".join(sentences[:8])[:400] if letter.isalpha()]
    if script and sum(unicodedata.name(letter, "").startswith(script) for letter in letters) < (
        filters.script_share * len(letters)
    ):
        return "wrong_script"
    return ""


def _groups(run: Sequence[Path], twice: Counter) -> Iterator[tuple[str, dict[str, dict]]]:
    """(item, record of each language) of a bucket, by item; `twice` counts second pages of an item, by language."""
    items: dict[str, dict[str, dict]] = {}
    for path in run:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                versions = items.setdefault(record["item"], {})
                known = versions.get(record["lang"])
                twice[record["lang"]] += known is not None
                # Two pages of one wiki with one item are a slip of its editors: the older page is the likelier one.
                if known is None or record["page"] < known["page"]:
                    versions[record["lang"]] = record
    for item in sorted(items):
        yield item, dict(sorted(items[item].items()))


def _category_sizes(run: Sequence[Path]) -> Counter:
    """Groups of each category, over the groups of a bucket."""
    sizes: Counter = Counter()
    for _, versions in _groups(run, Counter()):
        if len(versions) > 1:
            sizes.update({name for record in versions.values() for name in record["categories"]})
    return sizes


def choose_category(versions: Iterable[dict], sizes: Counter) -> tuple[str, ...]:
    """(topic, category) of a group: the smallest category it shares with another group, as far as there is one."""
    versions = list(versions)
    usable = {name for v in versions for name in v["categories"] if 2 <= sizes[name] <= LARGEST_CATEGORY}
    topic = next((v["topic"] for v in versions if v["topic"]), "")
    # Names break ties, so that the choice never depends on an order.
    best = min(usable, key=lambda name: (sizes[name], name), default="")
    return tuple(name for name in (topic, best) if name)


def _merge(task: tuple) -> dict:
    """Write the groups of one bucket as documents, one file a split; returns their counts."""
    run, folder, sizes = task
    report = {
        "one_language": 0,
        "item_twice": Counter(),
        "groups": Counter(),
        "documents": {s: Counter() for s in SPLITS},
    }
    with output_folder(folder) as out:
        files = {split: gzip.GzipFile(out / f"{split}.jsonl.gz", "wb", compresslevel=6, mtime=0) for split in SPLITS}
        for item, versions in _groups(run, report["item_twice"]):
            if len(versions) < 2:
                report["one_language"] += 1
                continue
            split = split_of(item)
            categories = choose_category(versions.values(), sizes)
            report["groups"][split] += 1
            for language, record in versions.items():
                document = Document(
                    item, language, record["title"], sentences=tuple(record["sentences"]), categories=categories
                )
                files[split].write((document.as_json() + "\n").encode())
                report["documents"][split][language] += 1
        for file in files.values():
            file.close()
    return report


def _report(dumps: Dumps, counts: dict[str, Counter], problems: list[str], merged: list[dict]) -> dict:
    for part in merged:
        for language, number in part["item_twice"].items():
            counts[language]["item_twice"] += number
    splits = {}
    for split in SPLITS:
        documents = sum((part["documents"][split] for part in merged), Counter())
        groups = sum(part["groups"][split] for part in merged)
        splits[split] = {"groups": groups, "documents": dict(sorted(documents.items()))}
    return {
        "groups": sum(split["groups"] for split in splits.values()),
        "left_out_one_language": sum(part["one_language"] for part in merged),
        "splits": splits,
        "filters": {language: {"pages": c["pages"]} | {f: c[f] for f in FILTERS} for language, c in counts.items()},
        "problems": problems,
        "notes": dumps.notes,
    }


def _parallel(function, tasks: list, workers: int, name: str) -> Iterator:
    """Results in the order of the tasks, with a progress bar over tasks."""
    workers = min(workers, len(tasks), os.cpu_count() or 1)
    with progress(total=len(tasks), desc=name, unit="file") as bar:
        if workers <= 1:
            for task in tasks:
                yield function(task)
                bar.update()
            return
        # Forked processes share the facts of all wikis instead of holding copies.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for result in pool.imap(function, tasks):
                yield result
                bar.update()
