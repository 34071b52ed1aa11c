"""What the SQL dumps say beside the pages: items, hidden categories, disambiguation pages, parents of categories.

Every dump is optional and each one that is there sharpens the result. The facts of one wiki are one SQLite file, so
memory stays the same for the largest wiki, and processes share it through the file system.

Owns the joins between tables and the language-neutral name ("key") of a category: its Wikidata item, else
`language:title`. Tracking categories have no key.
"""

import functools
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from hmde_dist.command import InputError
from hmde_dist.corpus.cirrus import language_of
from hmde_dist.corpus.sql_dump import read_rows

CATEGORY_NAMESPACE, ARTICLE_NAMESPACE = b"14", b"0"
TABLES = ("page", "page_props", "categorylinks", "linktarget", "langlinks")

# Tracking categories by name, after those that HMDE leaves out (its notes.txt): for where no dump tells which are hidden.
_TRACKING = re.compile(
    "Articles|articles|Wikidata|Wikipedia|Webarchive|CS1|AC with 0 elements|missing|invalid|Pages|pages|Template|errors"
    "|cleanup|Use dmy|Use mdy|Use [A-Z][a-z]+ English|^All |Source attribution|Biography with signature|EngvarB"
    "|Singlechart|usages|Commons|lacking|needing confirmation|certification|short description|Short description"
    "|Coordinates on"
)
_SCHEMA = """
CREATE TABLE item (page INTEGER PRIMARY KEY, item INTEGER NOT NULL);
CREATE TABLE hidden (page INTEGER PRIMARY KEY);
CREATE TABLE disambiguation (page INTEGER PRIMARY KEY);
CREATE TABLE article (title TEXT PRIMARY KEY, item INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE category_page (page INTEGER PRIMARY KEY, title TEXT NOT NULL);
CREATE TABLE category (title TEXT PRIMARY KEY, item INTEGER, hidden INTEGER) WITHOUT ROWID;
CREATE TABLE target (id INTEGER PRIMARY KEY, title TEXT NOT NULL);
CREATE TABLE parent (child TEXT NOT NULL, parent TEXT NOT NULL);
CREATE TABLE langlink (page INTEGER NOT NULL, language TEXT NOT NULL, title TEXT NOT NULL);
"""


def _create(path: Path, schema: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    # A file that is not whole is thrown away with its folder: no journal is needed.
    database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {schema} BEGIN;")
    return database


def _open(path: Path) -> sqlite3.Connection:
    facts = path.stat()
    return _connect(path, facts.st_ino, facts.st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=512)
def _connect(path: Path, inode: int, changed: int, process: int) -> sqlite3.Connection:
    # One for each file, whatever its name, and each process: SQLite forbids to carry a connection over a fork.
    return sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)


def _text(value: bytes) -> str:
    """A title as SQL dumps write it, with spaces."""
    return value.decode(errors="replace").replace("_", " ")


def write_sitelinks(folder: Path, dump: Path, wikis: Iterable[str]) -> list[str]:
    """Step: `sitelinks.sqlite`, a table of (title, item) for each of `wikis`, from Wikidata's wb_items_per_site.

    Returns the problems of the dump.
    """
    problems: list[str] = []
    wikis = list(wikis)
    tables = "".join(f'CREATE TABLE "{wiki}" (title TEXT NOT NULL, item INTEGER NOT NULL);' for wiki in wikis)
    database = _create(folder / "sitelinks.sqlite", f"CREATE TABLE category_item (item INTEGER PRIMARY KEY); {tables}")
    insert = {wiki.encode(): f'INSERT INTO "{wiki}" VALUES (?, ?)' for wiki in wikis}
    for item, site, title in read_rows(
        dump, "wb_items_per_site", ("ips_item_id", "ips_site_id", "ips_site_page"), problems
    ):
        if site in insert:
            database.execute(insert[site], (_text(title), int(item)))
        # The English wiki tells which items are categories, whatever their namespace is called elsewhere.
        if site == b"enwiki" and title.startswith(b"Category:"):
            database.execute("INSERT OR IGNORE INTO category_item VALUES (?)", (int(item),))
    database.execute("COMMIT")
    database.close()
    return problems


def write_facts(folder: Path, wiki: str, tables: Mapping[str, Path], sitelinks: Path | None) -> list[str]:
    """Step: `facts.sqlite` of one wiki, from its SQL dumps and the database of `write_sitelinks`.

    Returns the problems of damaged dumps.
    """
    problems: list[str] = []
    database = _create(folder / "facts.sqlite", _SCHEMA)

    def rows(table: str, *columns: str):
        return read_rows(tables[table], table, columns, problems) if table in tables else ()

    for page, name, value in rows("page_props", "pp_page", "pp_propname", "pp_value"):
        if name == b"wikibase_item" and re.fullmatch(rb"Q[0-9]{1,18}", value or b""):
            database.execute("INSERT OR IGNORE INTO item VALUES (?, ?)", (int(page), int(value[1:])))
        elif name in (b"hiddencat", b"disambiguation"):
            table = "hidden" if name == b"hiddencat" else "disambiguation"
            database.execute(f"INSERT OR IGNORE INTO {table} VALUES (?)", (int(page),))
    for page, namespace, title in rows("page", "page_id", "page_namespace", "page_title"):
        if namespace == CATEGORY_NAMESPACE:
            database.execute("INSERT OR IGNORE INTO category_page VALUES (?, ?)", (int(page), _text(title)))
        elif namespace == ARTICLE_NAMESPACE:
            database.execute(
                "INSERT OR IGNORE INTO article SELECT ?, item FROM item WHERE page = ?", (_text(title), int(page))
            )
    # Without page_props nothing is known of what is hidden.
    known = "hidden.page IS NOT NULL" if "page_props" in tables else "NULL"
    database.execute(
        f"INSERT OR IGNORE INTO category SELECT title, item, {known} FROM category_page "
        "LEFT JOIN item USING (page) LEFT JOIN hidden USING (page)"
    )
    if sitelinks is not None:
        _add_sitelinks(database, wiki, sitelinks)
    _add_parents(database, rows)
    for page, language, title in rows("langlinks", "ll_from", "ll_lang", "ll_title"):
        database.execute(
            "INSERT INTO langlink SELECT ?1, ?2, ?3 WHERE NOT EXISTS (SELECT 1 FROM item WHERE page = ?1)",
            (int(page), language.decode(errors="replace"), _text(title)),
        )
    database.execute("COMMIT")
    database.executescript(
        "DROP TABLE category_page; DROP TABLE target; DROP TABLE hidden; CREATE INDEX langlink_page ON langlink (page);"
    )
    database.close()
    return problems


def _add_sitelinks(database: sqlite3.Connection, wiki: str, sitelinks: Path) -> None:
    links = _open(sitelinks)
    prefix = links.execute(
        f'SELECT substr(title, 1, instr(title, ":")) AS prefix FROM "{wiki}" JOIN category_item USING (item) '
        'WHERE instr(title, ":") GROUP BY prefix ORDER BY count(*) DESC, prefix LIMIT 1'
    ).fetchone()
    for title, item in links.execute(f'SELECT title, item FROM "{wiki}"'):
        if prefix and title.startswith(prefix[0]):
            database.execute(
                "INSERT INTO category VALUES (?, ?, NULL) ON CONFLICT DO UPDATE SET item = coalesce(item, excluded.item)",
                (title.removeprefix(prefix[0]), item),
            )
        else:
            database.execute("INSERT OR IGNORE INTO article VALUES (?, ?)", (title, item))


def _add_parents(database: sqlite3.Connection, rows) -> None:
    """The category graph by titles: `cl_to` until 2025, `cl_target_id` through linktarget since."""
    for target, namespace, title in rows("linktarget", "lt_id", "lt_namespace", "lt_title"):
        if namespace == CATEGORY_NAMESPACE:
            database.execute("INSERT OR IGNORE INTO target VALUES (?, ?)", (int(target), _text(title)))
    for page, kind, title, target in rows("categorylinks", "cl_from", "cl_type", "cl_to?", "cl_target_id?"):
        if kind != b"subcat":
            continue
        if title is not None:
            database.execute(
                "INSERT INTO parent SELECT title, ? FROM category_page WHERE page = ?", (_text(title), int(page))
            )
        elif target is not None:
            database.execute(
                "INSERT INTO parent SELECT child.title, target.title FROM category_page AS child, target "
                "WHERE child.page = ? AND target.id = ?",
                (int(page), int(target)),
            )


class WikiFacts:
    """The facts of one wiki; what no dump said is empty.

    Args:
        path: of `facts.sqlite`.
        language: of the wiki.
        others: facts files of all languages, to follow links between languages.
    """

    def __init__(self, path: Path, language: str, others: Mapping[str, Path]):
        self.language, self.others = language, others
        self._database = _open(path)
        self.category_key = functools.lru_cache(maxsize=1 << 16)(self._category_key)

    def _value(self, query: str, *arguments):
        row = self._database.execute(query, arguments).fetchone()
        return row[0] if row else None

    def is_disambiguation(self, page: int) -> bool:
        return self._value("SELECT 1 FROM disambiguation WHERE page = ?", page) is not None

    def item_of(self, page: int, title: str) -> str:
        """The item of a page whose search document names none: from page_props, sitelinks, or links to other wikis."""
        item = self._value("SELECT item FROM item WHERE page = ?", page) or self._article(self._database, title)
        if not item:
            for language, linked in self._database.execute(
                "SELECT language, title FROM langlink WHERE page = ? ORDER BY language", (page,)
            ):
                try:
                    path = self.others.get(language_of(language.replace("-", "_") + "wiki"))
                except InputError:
                    continue
                item = item or (path and self._article(_open(path), linked))
        return f"Q{item}" if item else ""

    @staticmethod
    def _article(database: sqlite3.Connection, title: str) -> int | None:
        row = database.execute("SELECT item FROM article WHERE title = ?", (title,)).fetchone()
        return row[0] if row else None

    def _category_key(self, title: str) -> str:
        """The language-neutral name of a category, "" for one that is hidden or only tracks something."""
        row = self._database.execute("SELECT item, hidden FROM category WHERE title = ?", (title,)).fetchone()
        item, hidden = row or (None, None)
        if hidden or "\n" in title or (hidden is None and _TRACKING.search(title)):
            return ""
        return f"Q{item}" if item else f"{self.language}:{title}"

    def parents(self) -> Iterable[tuple[str, str]]:
        """(child, parent) keys of the whole category graph of the wiki."""
        for child, parent in self._database.execute("SELECT child, parent FROM parent"):
            keys = self.category_key(child), self.category_key(parent)
            if all(keys) and keys[0] != keys[1]:
                yield keys


def write_graph(folder: Path, facts: Mapping[str, Path]) -> None:
    """Step: `graph.sqlite`, the parents of every category by key, over all wikis."""
    database = _create(
        folder / "graph.sqlite",
        "CREATE TABLE parent (child TEXT, parent TEXT, PRIMARY KEY (child, parent)) WITHOUT ROWID;",
    )
    for language, path in sorted(facts.items()):
        database.executemany("INSERT OR IGNORE INTO parent VALUES (?, ?)", WikiFacts(path, language, facts).parents())
    database.execute("COMMIT")
    database.close()


def ancestors(graph: Path, keys: Iterable[str], depth: int) -> list[list[str]]:
    """The categories above `keys`, those one step up first: `depth` sorted lists, none twice.

    The walk is bounded because the graph has cycles and its tops hold everything.
    """
    seen, level, levels = set(keys), sorted(keys), []
    for _ in range(depth):
        above = {parent for key in level for parent in _parents(_open(graph), key)}
        level = sorted(above - seen)
        seen |= above
        levels.append(level)
    return levels


@functools.lru_cache(maxsize=1 << 16)
def _parents(graph: sqlite3.Connection, key: str) -> tuple[str, ...]:
    return tuple(row[0] for row in graph.execute("SELECT parent FROM parent WHERE child = ?", (key,)))


def write_sizes(folder: Path, counts: Iterable[Path]) -> None:
    """Step: `sizes.sqlite`, groups of each category, the sum over files of `count<TAB>key` lines."""
    database = _create(
        folder / "sizes.sqlite", "CREATE TABLE size (key TEXT PRIMARY KEY, groups INTEGER NOT NULL) WITHOUT ROWID;"
    )
    for path in counts:
        with open(path, encoding="utf-8", newline="\n") as lines:
            database.executemany(
                "INSERT INTO size VALUES (?2, ?1) ON CONFLICT DO UPDATE SET groups = groups + excluded.groups",
                (line.rstrip("\n").split("\t", 1) for line in lines),
            )
    database.execute("COMMIT")
    database.close()


def size_of(sizes: Path, key: str) -> int:
    """Groups of a category."""
    return _size(_open(sizes), key)


@functools.lru_cache(maxsize=1 << 18)
def _size(sizes: sqlite3.Connection, key: str) -> int:
    row = sizes.execute("SELECT groups FROM size WHERE key = ?", (key,)).fetchone()
    return row[0] if row else 0
