"""Rows of MediaWiki's SQL dumps (mysqldump, mariadb-dump), streamed as bytes, and the bytes of compressed dump files.

Owns the decompression that keeps what precedes damage, and a tokenizer for both row layouts: many tuples on the line
of one INSERT, and one tuple a line. Columns are found by the names in CREATE TABLE, for their order differs by year.
Refuses a file without the table or without a required column; never decodes a value, for sort keys are no UTF-8.
"""

import bz2
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from hmde_dist.command import InputError, progress

CHUNK = 1 << 18
LONGEST = 1 << 24
BZ2_BLOCK = 1 << 21  # of at most 900,000 bytes, but runs of one character count less

_DECODERS = {".bz2": bz2.BZ2Decompressor, ".gz": lambda: zlib.decompressobj(31)}

# Possessive and atomic throughout: a row cut by the end of a chunk fails in one pass, without going back. Groups are
# atomic and not possessive: before Python 3.11.5 a possessive group that holds alternatives matches wrongly (gh-106052).
_QUOTED = rb"'[^'\\]*+(?>(?:\\.[^'\\]*+)*)'"
_VALUE = rb"(?>%b|[-+.\w]++)" % _QUOTED
# One group for a quoted value and a number alike, so that the groups of a match are the row; NULL leaves it None.
_CELL = rb"(?>NULL|'?+((?<=')[^'\\]*+(?>(?:\\.[^'\\]*+)*)|(?<!')[-+.\w]++)'?+)"
_HALF_ROW = re.compile(
    rb"\s*+(?>(?:,\s*+)?)(?:\((?>(?:%b,)*)(?:%b|'[^'\\]*+(?>(?:\\.[^'\\]*+)*)\\?|[-+.\w]*+))?" % (_VALUE, _VALUE), re.S
)
_BETWEEN_ROWS = re.compile(rb"\s*+;")

_BLANK = re.compile(rb"(?>(?:\s++|(?:--|#)[^\n]*+\n|/\*(?>(?:[^*]++|\*(?!/))*)\*/;?)*)")
_STATEMENT = re.compile(
    rb"(?!--|#|/\*)(?>(?:[^'\"`;]++|%b|\"[^\"\\]*+(?>(?:\\.[^\"\\]*+)*)\"|`[^`]*+`)*);" % _QUOTED, re.S
)
_INSERT = re.compile(rb"(?:INSERT|REPLACE)(?: IGNORE)? INTO `([^`]+)` (?:\(([^)]*)\) )?VALUES")
_CREATE = re.compile(rb"CREATE TABLE (?:IF NOT EXISTS )?`([^`]+)` \(\r?\n")
_COLUMN = re.compile(rb"^\s*`([^`]+)`", re.M)

_ESCAPE = re.compile(rb"\\(.)", re.S)
_ESCAPED = {b"0": b"\0", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"Z": b"\x1a"}


class Damage(Exception):
    """A dump that cannot be read on at `offset`, in bytes of the decompressed file, for this `reason`."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"{reason} at byte {offset}")
        self.offset, self.reason = offset, reason


def read_chunks(path: str | Path, size: int = CHUNK) -> Iterator[bytes]:
    """The content of a plain, .gz or .bz2 file in parts of at most `size` bytes, with a progress bar over the file.

    Unlike the standard library's readers this one reports a damaged second stream of a .bz2 file, and gives only
    parts of it whose checksum was right. The checksum of a .gz file is at its end: wrong parts may come before `Damage`.

    Raises:
        InputError: the file cannot be opened.
        Damage: after all that could be read: the file is empty, cut short or corrupt, or the disk failed.
    """
    path = Path(path)
    try:
        raw = open(path, "rb", buffering=0)
        total = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    offset = 0
    with raw, progress(total=total, desc=f"read {path.name}", unit="B", unit_scale=True) as bar:
        parts = _decompress(iter(lambda: raw.read(size), b""), _DECODERS.get(path.suffix), size)
        try:
            for part in _hold_back(parts, BZ2_BLOCK if path.suffix == ".bz2" else 0):
                offset += len(part)
                bar.update(raw.tell() - bar.n)
                yield part
        except EOFError:
            raise Damage(offset, "cut short: the compressed data have no end") from None
        except (OSError, zlib.error) as error:
            raise Damage(offset, f"corrupt ({error})") from None
    if not offset:
        raise Damage(0, "empty")


def _decompress(stored: Iterable[bytes], new_decoder: Callable | None, size: int) -> Iterator[bytes]:
    """What `stored` decompress to, in parts of at most `size` bytes, whatever the ratio; EOFError if they have no end."""
    decoder = None
    for data in stored:
        if new_decoder is None:
            yield data
            continue
        # Between streams, of which a file may have many, zeros are padding.
        while data := data if decoder else data.lstrip(b"\0"):
            decoder = decoder or new_decoder()
            waiting = True
            while waiting and not decoder.eof:
                if part := decoder.decompress(data, size):
                    yield part
                # Input that is left waits in zlib's `unconsumed_tail`, or inside of bz2's decoder.
                data = getattr(decoder, "unconsumed_tail", b"")
                waiting = data or len(part) == size
            data = decoder.unused_data
            decoder = None if decoder.eof else decoder
    if decoder:
        raise EOFError


def _hold_back(parts: Iterable[bytes], hold: int) -> Iterator[bytes]:
    """The same parts, each given when `hold` bytes after it are known; the last `hold` bytes are lost with an error.

    bz2 gives out a block before it finds the block's checksum wrong; without this, four of ten flipped bits gave
    records that are valid JSON with a wrong text.
    """
    held: deque[bytes] = deque()
    surplus = -hold
    try:
        for part in parts:
            held.append(part)
            surplus += len(part)
            while held and surplus >= len(held[0]):
                surplus -= len(held[0])
                yield held.popleft()
    except EOFError:
        yield from held
        raise
    yield from held


class _Window:
    """The part of a file that is being read: `data` from `position` on."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.data, self.position, self.start = chunks, b"", 0, 0

    @property
    def offset(self) -> int:
        return self.start + self.position

    def grow(self) -> bool:
        """Read on, and forget what is before `position`; False at the end of the file."""
        chunk = next(self.chunks, None)
        if chunk is None:
            return False
        rest = self.data[self.position :]
        if len(rest) > LONGEST:
            raise Damage(self.offset, f"no end of a row or statement within {LONGEST >> 20} MiB")
        self.start, self.position, self.data = self.offset, 0, rest + chunk
        return True


def read_rows(
    path: str | Path, table: str, columns: Sequence[str], problems: list[str], chunk: int = CHUNK
) -> Iterator[tuple[bytes | None, ...]]:
    """The rows of `table` in a dump file (.sql or .sql.gz): the named columns, in the order of `columns`.

    A value is the bytes of a string without quotes and escapes, or the digits of a number; None is NULL. Takes
    constant memory. When the file is damaged, the rows before the damage are given and `problems` gets one line. A
    name of `columns` that ends in "?" is optional: None in every row where the table lacks it.

    Raises:
        InputError: the file cannot be opened, has no CREATE TABLE for `table`, or the table lacks a required column.
    """
    window = _Window(read_chunks(path, chunk))
    names: list[str] | None = None
    rows = 0
    try:
        while head := _next_statement(window, table):
            if create := _CREATE.match(head):
                if create[1] == table.encode():
                    names = [name.decode(errors="replace") for name in _COLUMN.findall(head)]
                    _order(path, table, names, columns)
            elif (insert := _INSERT.fullmatch(head)) and insert[1] == table.encode():
                if insert[2]:
                    names = [name.strip("` ") for name in insert[2].decode(errors="replace").split(",")]
                if names is None:
                    break
                for row in _rows(window, names, _order(path, table, names, columns)):
                    rows += 1
                    yield row
            elif head[:7].upper() in (b"INSERT ", b"REPLACE") and not _INSERT.match(head):
                raise Damage(window.offset - len(head), "an INSERT in a form that no dump program writes")
    except Damage as damage:
        problems.append(f"{path}: damaged at byte {damage.offset} (decompressed), after {rows} rows: {damage.reason}")
    else:
        if names is None:
            raise InputError(f"{path}: holds no CREATE TABLE for `{table}`; is it another table's dump?")


def _order(path: str | Path, table: str, names: Sequence[str], columns: Sequence[str]) -> list[int]:
    """The position in a row of the table for each of `columns`, -1 for an optional one that is not there."""
    missing = [column for column in columns if not column.endswith("?") and column not in names]
    if missing:
        raise InputError(f"{path}: table `{table}` has no column {', '.join(missing)}; it has {', '.join(names)}")
    plain = [column.removesuffix("?") for column in columns]
    return [names.index(column) if column in names else -1 for column in plain]


def _next_statement(window: _Window, table: str) -> bytes:
    """The next statement whole, or of an INSERT into `table` the part before the rows; b"" at the end of the file."""
    while True:
        window.position = _BLANK.match(window.data, window.position).end()
        found = _INSERT.match(window.data, window.position)
        if not found or found[1] != table.encode():
            found = _STATEMENT.match(window.data, window.position)
        if found:
            window.position = found.end()
            return found[0]
        if not window.grow():
            rest = window.data[window.position :]
            if rest and not rest.startswith((b"--", b"#")):
                raise Damage(window.offset, "the file ends within a statement")
            return b""


def _rows(window: _Window, names: Sequence[str], order: Sequence[int]) -> Iterator[tuple[bytes | None, ...]]:
    """The rows of one INSERT, whose `VALUES` has been read, up to its semicolon."""
    cells = [_CELL if position in order else _VALUE for position in range(len(names))]
    row = re.compile(rb"\s*+,?+\s*+\(%b\)" % b",".join(cells), re.S)
    pick = _picker(order)
    while True:
        data, end = window.data, window.position
        escape = data.find(b"\\", end)
        # `scanner` matches row after row without a gap, which `finditer` would jump over.
        for match in iter(row.scanner(data, end).match, None):
            end = match.end()
            values = match.groups()
            if -1 < escape < end:
                values = tuple([v and _ESCAPE.sub(lambda m: _ESCAPED.get(m[1], m[1]), v) for v in values])
                escape = data.find(b"\\", end)
            yield pick(values)
        window.position = end
        if close := _BETWEEN_ROWS.match(data, end):
            window.position = close.end()
            return
        if not _HALF_ROW.fullmatch(data, end):
            raise Damage(window.offset, f"no row of {len(names)} values")
        if not window.grow():
            raise Damage(window.offset, "the file ends within an INSERT")


def _picker(order: Sequence[int]) -> Callable[[tuple], tuple]:
    """From the values of the wanted columns, in the table's order, to those asked for."""
    present = sorted(set(order) - {-1})
    if list(order) == present:
        return lambda values: values
    places = [present.index(position) if position >= 0 else len(present) for position in order]
    if len(places) == 1:
        return lambda values: ((*values, None)[places[0]],)
    get = itemgetter(*places)
    return lambda values: get((*values, None))
