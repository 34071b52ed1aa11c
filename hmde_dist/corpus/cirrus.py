"""Wikipedia pages from CirrusSearch index dumps, and which dump files of which wikis a folder holds.

Owns the record format (an action line, then a document line), the names of dump files and the language of a wiki.
Keeps what precedes damage and skips a record that is wrong, each with a line in `problems`; never repairs one, never
filters by content and knows nothing of documents.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import LANGUAGE_CODE
from hmde_dist.corpus.sql_dump import CHUNK, Damage, read_chunks

SQL_TABLES = ("page_props", "categorylinks", "linktarget", "langlinks", "page", "wb_items_per_site")
SHOWN_PROBLEMS = 3
LONGEST_LINE = 1 << 26

_CONTENT = re.compile(r"(?P<wiki>[a-z0-9_]+)_content-(?P<date>\d{8})-(?P<part>\d+)\.json(?:\.bz2|\.gz)?")
_SQL = re.compile(rf"(?P<wiki>[a-z0-9_]+)-(?P<date>\d{{8}}|latest)-(?P<table>{'|'.join(SQL_TABLES)})\.sql(?:\.gz)?")
_NUMBER = re.compile("[0-9]{1,18}")
_TOPIC = "classification.prediction.articletopic/"

# Database names that are neither their language's code nor that code with "_" for "-". "zh-classical" would be no
# valid code ("classical" has nine letters), so Classical Chinese has its ISO 639-3 code.
_LANGUAGES = {"be_x_old": "be-tarask", "zh_classical": "lzh"}
_NO_LANGUAGE = frozenset(
    "commons foundation incubator mediawiki meta outreach quality sources species strategy ten test test2 testwikidata"
    " thankyou usability wikidata wikifunctions wikimania".split()
)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of one wiki, as its search index holds it.

    Attributes:
        wiki: database name, "enwiki".
        text: one line without headings, tables and captions; may be empty.
        item: Wikidata item, "Q42", or "".
        categories: titles in the wiki's language, with spaces and without "Category:".
        topics: language-neutral article topics, the most probable first.
        language: the page's own `language` field, or ""; see `language_of` for the wiki's.
        templates: titles with their namespace.
    """

    wiki: str
    page_id: int
    namespace: int
    title: str
    text: str
    item: str = ""
    categories: tuple[str, ...] = ()
    page_type: str = ""
    topics: tuple[str, ...] = ()
    language: str = ""
    templates: tuple[str, ...] = ()
    is_redirect: bool = False


def read_pages(path: str | Path, problems: list[str], chunk: int = CHUNK) -> Iterator[Page]:
    """The pages of one dump file (.json.bz2, .json.gz, .json), in its order, in constant memory.

    A record that is wrong is left out: no JSON, a lone action line, a required field missing, a field of another
    type. `problems` gets a line for the first `SHOWN_PROBLEMS` of these and one with the number of the others. When
    the file is damaged, the pages before that are given and `problems` gets one line. `chunk` bytes are read at once.

    Raises:
        InputError: the file cannot be opened.
    """
    named = _CONTENT.fullmatch(Path(path).name)
    pages = faults = 0

    def fault(offset: int, reason: str) -> None:
        nonlocal faults
        faults += 1
        if faults <= SHOWN_PROBLEMS:
            problems.append(f"{path}: record left out at byte {offset} (decompressed), after {pages} pages: {reason}")

    try:
        for offset, action, record in _records(_lines(read_chunks(path, chunk)), fault):
            try:
                page = _page(record, action, named["wiki"] if named else "")
            except ValueError as error:
                fault(offset, str(error))
                continue
            yield page
            pages += 1
    except Damage as damage:
        problems.append(f"{path}: damaged at byte {damage.offset} (decompressed), after {pages} pages: {damage.reason}")
    if faults > SHOWN_PROBLEMS:
        problems.append(f"{path}: {faults - SHOWN_PROBLEMS} more records left out")


def _records(lines: Iterable[tuple[int, bytes]], fault: Callable[[int, str], None]) -> Iterator[tuple[int, dict, dict]]:
    """The documents, each with its offset and before it its action."""
    due, begun, unread = None, 0, False
    for offset, line in lines:
        try:
            record = json.loads(line.decode())
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            fault(offset, f"no JSON, or half a line ({error})")
            # If this was an action, its document is no fault of its own.
            due, unread = None, due is None
            continue
        is_action = len(record) == 1 and isinstance(record.get("index"), dict)
        if is_action and due is not None:
            fault(begun, "an action line without its document")
        elif not is_action and due is not None:
            yield offset, due, record
        elif not is_action and not unread:
            fault(offset, "a document without its action line")
        due, begun, unread = record["index"] if is_action else None, offset, False
    if due is not None:
        fault(begun, "an action line without its document")


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its offset."""
    offset, rest = 0, b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield offset, line
            offset += len(line) + 1
        if len(rest) > LONGEST_LINE:
            raise Damage(offset, f"a line of more than {LONGEST_LINE >> 20} MiB")
    if rest.strip():
        yield offset, rest


def _page(record: dict, action: dict, wiki: str) -> Page:
    is_redirect = record.get("page_type") == "redirect"
    if type(record.get("namespace")) is not int:
        raise ValueError('"namespace" is missing or no integer')
    # Older dumps write the number as a string.
    ids = [value for value in (record.get("page_id"), action.get("_id")) if _NUMBER.fullmatch(str(value))]
    if not ids:
        raise ValueError('neither "page_id" nor "_id" is a number')
    page = Page(
        wiki=_string(record, "wiki") or wiki,
        page_id=int(ids[0]),
        namespace=record["namespace"],
        title=_string(record, "title", required=True),
        # A redirect has no text of its own to miss.
        text=_string(record, "text", required=not is_redirect),
        item=_string(record, "wikibase_item"),
        categories=_strings(record, "category"),
        page_type=_string(record, "page_type"),
        topics=_topics(_strings(record, "weighted_tags")),
        language=_string(record, "language"),
        templates=_strings(record, "template"),
        is_redirect=is_redirect,
    )
    if not page.title:
        raise ValueError('"title" is empty')
    # Half a surrogate pair raises UnicodeEncodeError, a ValueError.
    "".join((page.title, page.text, *page.categories, *page.topics, *page.templates)).encode()
    return page


def _string(record: dict, key: str, required: bool = False) -> str:
    value = record.get(key) if required else record.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {"missing" if value is None else "no string"}')
    return value


def _strings(record: dict, key: str) -> tuple[str, ...]:
    """A list of strings; the index takes one string for a list of one."""
    value = record.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f'"{key}" is no list of strings')
    return tuple(values)


def _topics(tags: Iterable[str]) -> tuple[str, ...]:
    """The names in tags like `classification.prediction.articletopic/Culture.Media.Music|1000`, by falling score."""
    found = [tag.removeprefix(_TOPIC).partition("|") for tag in tags if tag.startswith(_TOPIC)]
    found.sort(key=lambda parts: -int(parts[2]) if parts[2].isdecimal() else 0)
    return tuple(name for name, _, _ in found if name != "__DELETE_GROUPING__")


@dataclass
class Dumps:
    """The dump files below a folder, the newest date of each, and a note on each file or date left out for another.

    Content files are by wiki, in the order of their parts; SQL dumps by wiki, then by table (one of `SQL_TABLES`).
    """

    wikis: dict[str, list[Path]] = field(default_factory=dict)
    sql: dict[str, dict[str, Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_dumps(folder: str | Path) -> Dumps:
    """The content and SQL dumps below `folder`, at any depth, known by their names; other files are passed over.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of dumps")
    dated: dict[tuple[str, str], dict[str, dict[int, Path]]] = {}
    dumps = Dumps()
    for path in sorted(folder.rglob("*")):
        named = _CONTENT.fullmatch(path.name) or _SQL.fullmatch(path.name)
        if not named or not path.is_file():
            continue
        name = named.groupdict()
        parts = dated.setdefault((name["wiki"], name.get("table", "")), {}).setdefault(name["date"], {})
        kept = parts.setdefault(int(name.get("part", 0)), path)
        if kept != path:
            dumps.notes.append(f"{path}: left out, for {kept} is the same dump")
    for (wiki, table), dates in sorted(dated.items()):
        # "latest", a name of the dump server's, sorts after every date.
        *older, newest = sorted(dates)
        parts = [path for _, path in sorted(dates[newest].items())]
        if table:
            dumps.sql.setdefault(wiki, {})[table] = parts[0]
        else:
            dumps.wikis[wiki] = parts
        dumps.notes += [f"{wiki} {table or 'content'}: {date} left out, for {newest} is newer" for date in older]
    return dumps


def language_of(wiki: str) -> str:
    """The lower-case language code of a Wikipedia by its database name.

    As Wikimedia's own codes: enwiki is "en", nowiki "no" (Bokmål), simplewiki "simple", zh_yuewiki "zh-yue",
    zh_min_nanwiki "zh-min-nan", nds_nlwiki "nds-nl", roa_rupwiki "roa-rup"; be_x_oldwiki is "be-tarask" and
    zh_classicalwiki "lzh".

    Raises:
        InputError: the name of another project (enwiktionary, commonswiki), or of none.
    """
    name = wiki.removesuffix("wiki")
    code = _LANGUAGES.get(name, name.replace("_", "-"))
    if name == wiki or name in _NO_LANGUAGE or not LANGUAGE_CODE.fullmatch(code):
        raise InputError(f'"{wiki}" is no Wikipedia; use database names such as "enwiki", "zh_yuewiki"')
    return code
