"""The SQL dumps: the tables of a wiki, and Wikidata's list of the pages of items.

Owns the rows of each table and how they are quoted, in the layouts of 2024, 2025 and 2026.
"""

import gzip
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from wikipedia_dumps import SQL_DATE, sql_text

from made_up_wikipedias.languages import LANGUAGES
from made_up_wikipedias.task import Task, timestamp
from made_up_wikipedias.world import BLOCK, Kind, Known, World, hashed

TABLES = ("categorylinks", "page_props", "page", "langlinks", "linktarget")
_SPECIAL = re.compile(rb"[\0\n\r\x1a\"'\\]")
_ESCAPES = {b"\0": rb"\0", b"\n": rb"\n", b"\r": rb"\r", b"\x1a": rb"\Z", b'"': rb"\"", b"'": rb"\'", b"\\": rb"\\"}
_SORT_KEY = bytes((5 * byte + 41) % 256 for byte in range(256))


def tables_folder(folder: Path, wiki: str) -> Path:
    return folder / wiki / SQL_DATE


def quoted(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return b"'%b'" % _SPECIAL.sub(lambda match: _ESCAPES[match[0]], value)


def key(title: str) -> bytes:
    """A title as SQL tables have it."""
    return quoted(title.replace(" ", "_"))


def write_table(world: World, task: Task) -> Counter:
    """Write a table of a wiki, or Wikidata's; returns the bytes."""
    wiki = "wikidatawiki" if task.table == "wb_items_per_site" else f"{task.language}wiki"
    role = world.languages.index(task.language) if task.language else 0
    layout = "one_line" if role == 1 else "lines"
    schema = {1: "old", 2: "transitional"}.get(role, "new")
    whole = sql_text(wiki, task.table, (), layout, schema)
    cut = whole.index(b"/*!40000 ALTER TABLE `%b` ENABLE" % task.table.encode())
    opening, between = (b"\n", b",\n") if layout == "lines" else (b" ", b",")
    path = tables_folder(task.folder, wiki) / f"{wiki}-{SQL_DATE}-{task.table}.sql.gz"
    if task.table == "wb_items_per_site":
        blocks = _sitelinks(world)
    elif task.table == "linktarget":
        blocks = _link_targets(world, task.language)
    else:
        blocks = _page_rows(world, task.language, _ROWS[task.table], schema)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as out:
        out.write(whole[:cut])
        for rows in blocks:
            if rows:
                out.write(b"INSERT INTO `%b` VALUES%b%b;\n" % (task.table.encode(), opening, between.join(rows)))
        out.write(whole[cut:])
    return Counter({"sql bytes": path.stat().st_size})


def _page_rows(world: World, language: str, rows_of: Callable, schema: str) -> Iterator[list[bytes]]:
    for start in range(0, world.slots, 8 * BLOCK):
        page_ids = np.arange(start, min(start + 8 * BLOCK, world.slots)) + 1
        numbers = world.numbers(language, page_ids)
        kinds = world.kinds(language, numbers)
        there = kinds != Kind.NONE
        if there.any():
            yield rows_of(world, language, numbers[there], kinds[there], page_ids[there].tolist(), schema)


def _page(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    namespaces = np.select([kinds == Kind.CATEGORY, kinds == Kind.PORTAL], [14, 100], 0).tolist()
    bits = hashed(world.seed, "bits", language, numbers).tolist()
    columns = zip(page_ids, namespaces, world.titles(language, numbers), (kinds == Kind.REDIRECT).tolist(), bits, strict=True)  # fmt: skip
    return [
        b"(%d,%d,%b,%d,0,0.%d,'202609%02d010203',%b,%d,%d,'wikitext',NULL)"
        % (page, namespace, key(title), redirect, b % 10**12, 1 + b % 28, b"NULL" if b % 3 else b"'20260902030405'",
           900_000_000 + b % 2**28, 200 + b % 20000)
        for page, namespace, title, redirect, b in columns
    ]  # fmt: skip


def _page_props(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    items = world.item_ids(language, numbers, kinds).tolist()
    known = world.known(language, numbers, kinds).tolist()
    hidden = (numbers >= 2 * world.items + world.shared + world.own).tolist()
    rows = []
    columns = zip(page_ids, kinds.tolist(), world.titles(language, numbers), items, known, hidden, strict=True)
    for page, kind, title, item, place, is_hidden in columns:
        if kind == Kind.DISAMBIGUATION:
            rows.append(b"(%d,'disambiguation','',NULL)" % page)
        if page % 19 == 0:
            rows.append(b"(%d,'displaytitle',%b,NULL)" % (page, quoted(f"<i>It's (x),(y)\\ {title}</i>")))
        if is_hidden:
            rows.append(b"(%d,'hiddencat','',NULL)" % page)
        if kind == Kind.ARTICLE:
            rows.append(b"(%d,'page_image_free',%b,NULL)" % (page, key(f"{title}.jpg")))
        if place >= Known.PAGE_PROPS:
            rows.append(b"(%d,'wikibase_item','Q%d',NULL)" % (page, item))
    return rows


def _category_links(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    lists = world.category_lists(language, numbers, kinds)
    names = iter(world.category_titles(language, list(itertools.chain.from_iterable(lists))))
    rows = []
    columns = zip(page_ids, kinds.tolist(), world.titles(language, numbers), lists, strict=True)
    for page, kind, title, categories in columns:
        # As a collation makes them: bytes, and no UTF-8.
        sort_key = quoted(title.upper().encode()[:40].translate(_SORT_KEY))
        member = b"subcat" if kind == Kind.CATEGORY else b"page"
        when = timestamp(page * 40503, " ", "").encode()
        for category in categories:
            name, target = key(next(names)), _target(category)
            if schema == "new":
                row = b"(%d,%b,'%b','','%b',1,%d)" % (page, sort_key, when, member, target)
            elif schema == "transitional":
                row = b"(%d,%b,%b,'%b','','uca-default','%b',1,%d)" % (page, name, sort_key, when, member, target)
            else:
                row = b"(%d,%b,%b,'%b','','uca-default','%b')" % (page, name, sort_key, when, member)
            rows.append(row)
    return rows


def _lang_links(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    linked = world.known(language, numbers, kinds) >= Known.SITELINKS
    linked &= (kinds != Kind.TWICE) & (numbers < 2 * world.items + world.shared)
    numbers, is_category = numbers[linked], kinds[linked] == Kind.CATEGORY
    page_ids = list(itertools.compress(page_ids, linked))
    links: list[list[bytes]] = [[] for _ in page_ids]
    for other in sorted(world.languages):
        kinds = world.kinds(other, numbers)
        there = (other != language) & (world.known(other, numbers, kinds) >= Known.SITELINKS)
        spaces = [f"{LANGUAGES[other].category}:" if c else "" for c in is_category[there].tolist()]
        titles = world.titles(other, numbers[there])
        for place, space, title in zip(np.nonzero(there)[0].tolist(), spaces, titles, strict=True):
            links[place].append(b"(%d,'%b',%b)" % (page_ids[place], other.encode(), quoted(space + title)))
    return list(itertools.chain.from_iterable(links))


_ROWS = {"page": _page, "page_props": _page_props, "categorylinks": _category_links, "langlinks": _lang_links}


def _target(category: int) -> int:
    """The id in linktarget; the odd ones are of other namespaces."""
    return 1000 + 2 * category


def _link_targets(world: World, language: str) -> Iterator[list[bytes]]:
    for start in range(0, world.categories, BLOCK):
        categories = np.arange(start, min(start + BLOCK, world.categories))
        others = [title.replace(" ", "_") for title in world.titles(language, categories % world.items)]
        titles = world.category_titles(language, categories)
        exist = world.category_exists(language, categories).tolist()
        rows = []
        for category, title, other, there in zip(categories.tolist(), titles, others, exist, strict=True):
            if there:
                rows.append(b"(%d,14,%b)" % (_target(category), key(title)))
            rows.append(b"(%d,%d,%b)" % (_target(category) + 1, 10 * (category % 2), key(other)))
        yield rows


def _sitelinks(world: World) -> Iterator[list[bytes]]:
    """Rows of all items, then of all categories' items: each has one page a wiki."""
    row = itertools.count(55)
    for start in range(0, world.items, BLOCK):
        yield from _sitelinks_of(world, np.arange(start, min(start + BLOCK, world.items)), row)
    for start in range(0, world.shared + world.own, BLOCK):
        yield from _sitelinks_of(world, 2 * world.items + np.arange(start, min(start + BLOCK, world.shared + world.own)), row)  # fmt: skip


def _sitelinks_of(world: World, numbers: np.ndarray, row: Iterator[int]) -> Iterator[list[bytes]]:
    for language in world.languages:
        kinds = world.kinds(language, numbers)
        there = world.known(language, numbers, kinds) >= Known.SITELINKS
        items = world.item_ids(language, numbers, kinds)[there].tolist()
        spaces = [f"{LANGUAGES[language].category}:" if k == Kind.CATEGORY else "" for k in kinds[there].tolist()]
        titles = world.titles(language, numbers[there])
        yield [
            b"(%d,%d,'%bwiki',%b)" % (next(row), item, language.encode(), quoted(space + title))
            for item, space, title in zip(items, spaces, titles, strict=True)
        ]
