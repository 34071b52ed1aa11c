"""Readers: documents out of JSON lines, parquet, Hugging Face `datasets` folders and TREC text.

Owns which files are read and how each kind becomes records; what a record must hold is `documents.check_record`'s
matter. Memory does not grow with the files. Refuses kinds it does not know and damaged files, by name; repairs nothing.
"""

import argparse
import gzip
import html
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import FIELDS, Document, check_record, parse_record

# What a reader yields: the place that opens messages, the record, and how many bytes of the file are done.
Records = Iterator[tuple[str, dict, int]]

ROWS = 1000  # of a table that are Python objects at one time
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_EDGE = re.compile(rb"<(/?)DOC(?:\s[^<>]*)?>", re.IGNORECASE)
_TITLES = ("TITLE", "HEADLINE", "HEAD", "TI")
# Lead and text have their own elements in CLEF's SDA (LD, TX) and NRC/AD (LE, TE).
_TEXT = re.compile(r"<(TEXT|LD|TX|LE|TE)(?:\s[^<>]*)?>(.*?)</\1\s*>", re.IGNORECASE | re.DOTALL)
_INLINE_TAG = re.compile(r"</?(?:a|b|em|f|font|i|span|strong|sub|sup|u)(?:\s[^<>]*)?>", re.IGNORECASE)
_TAG = re.compile(r"<!--.*?-->|</?[a-z][^<>]*>", re.IGNORECASE | re.DOTALL)


def read_documents(paths: Iterable[str | Path], fields: Mapping[str, str] = {}, lang: str = "") -> Iterator[Document]:
    """The documents of files and folders of any kind, checked, with a progress bar over the bytes of each path.

    Takes and refuses what `read_records` does, and records that are no documents.
    """
    for where, record in read_records(paths, fields, lang):
        yield check_record(record, where)


def read_records(
    paths: Iterable[str | Path], fields: Mapping[str, str] = {}, lang: str = "", also: Iterable[str] = ()
) -> Iterator[tuple[str, dict]]:
    """(place, record) of files and folders of any kind: our fields by our names, their content unchecked.

    Args:
        paths: JSON lines (`.jsonl`, `.json`), parquet, TREC text (`.trec`, `.trectext`, `.sgml`, `.sgm`), all but
            parquet also with `.gz`; a folder of `datasets` (`save_to_disk`); a folder of parquet files at any depth.
        fields: what the source calls a field, by our name for it; "" leaves the field out. Not for TREC text.
        lang: language of documents that name none; TREC text needs it.
        also: fields of the source to keep beside ours, such as a label.

    Raises:
        InputError: a path that is missing, damaged or of another kind; the message names file and line, row or number
            of the document, and so does the place.
    """
    for name in fields:
        if name not in FIELDS:
            raise InputError(f'--field {name}: a document has no "{name}", only {", ".join(FIELDS)}')
    sources = {name: fields.get(name, name) for name in FIELDS if fields.get(name, name)}
    sources |= {name: name for name in also if name not in sources}
    for path in map(Path, paths):
        reader, files = _find(path)
        sizes = [file.stat().st_size for file in files]
        count = 0
        with progress(total=sum(sizes), desc=f"read {path.name}", unit="B", unit_scale=True) as bar:
            for number, file in enumerate(files):
                before = sum(sizes[:number])
                for where, record, done in reader(file, sources, lang):
                    yield where, record
                    count += 1
                    bar.update(before + done - bar.n)
                bar.update(before + sizes[number] - bar.n)
        if not count:
            raise InputError(f"{path}: holds no documents")


def field_source(text: str) -> tuple[str, str]:
    """`NAME=SOURCE` of a command line as an entry of `fields` (for `add_argument(type=...)`)."""
    name, equals, source = text.partition("=")
    if name not in FIELDS or not equals:
        raise argparse.ArgumentTypeError(f'"{text}" is no NAME=SOURCE with a NAME of {", ".join(FIELDS)}')
    return name, source


def _find(path: Path) -> tuple:
    """The reader of a path, and the files it reads."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = _entries(path / "dataset_dict.json", lambda found: [str(name) for name in found["splits"]])
            return _read_arrow, [file for split in splits for file in _arrow_files(path / split)]
        if (path / "state.json").is_file():
            return _read_arrow, _arrow_files(path)
        if files := sorted(path.rglob("*.parquet")):
            return _read_parquet, files
        raise InputError(
            f"{path}: neither a folder of Hugging Face datasets (state.json, dataset_dict.json) nor one with parquet "
            "files; name files of other kinds one by one"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file of documents")
    for endings, reader in _READERS.items():
        if path.name.endswith(endings):
            return reader, [path]
    known = ", ".join(ending for endings in _READERS for ending in endings)
    raise InputError(f"{path}: not a kind of file that is read; its name must end in one of {known}")


def _entries(path: Path, take) -> list[str]:
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: missing or damaged ({error!r}); copy or save the folder again") from None


def _arrow_files(folder: Path) -> list[Path]:
    names = _entries(folder / "state.json", lambda found: [str(file["filename"]) for file in found["_data_files"]])
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, though state.json names it; copy the folder again")
    return [folder / name for name in names]


def add_documents_argument(parser: argparse.ArgumentParser) -> None:
    """`--documents PATH ...`, of whatever `read_documents` reads."""
    parser.add_argument(
        "--documents", type=Path, nargs="+", required=True, metavar="PATH",
        help=".jsonl, .json, .parquet, .trec, .trectext, .sgml, .sgm, all but parquet also with .gz; "
        "a folder of datasets' save_to_disk or of parquet files",
    )  # fmt: skip


def _record(found: Mapping, sources: Mapping[str, str], lang: str) -> dict:
    """What the source calls its fields -> our names, with the language that documents without one have."""
    record = {name: found.get(source) for name, source in sources.items()}
    if record.get("lang") in (None, ""):
        record["lang"] = lang
    return record


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, line, bytes done of the file) of a plain or gzip file."""
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: damaged gzip file after {number} lines ({error})") from None


def _read_json(path: Path, sources: Mapping[str, str], lang: str) -> Records:
    for number, line, done in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _record(parse_record(line, where), sources, lang), done


def _read_parquet(path: Path, sources: Mapping[str, str], lang: str) -> Records:
    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        size, rows = path.stat().st_size, 0
        # Not mapped, a whole row group would be read into memory.
        with pyarrow.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            columns = _columns(path, file.schema_arrow.names, sources, lang)
            for batch in file.iter_batches(ROWS, columns=columns):
                rows += batch.num_rows
                yield batch, size * rows // file.metadata.num_rows

    return _read_table(path, batches(), sources, lang)


def _read_arrow(path: Path, sources: Mapping[str, str], lang: str) -> Records:
    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            columns = _columns(path, stream.schema.names, sources, lang)
            for batch in stream:
                yield batch.select(columns), file.tell()
            # Arrow takes a file that was cut between two batches for a shorter one.
            file.seek(max(0, file.size() - len(END_OF_STREAM)))
            if file.read() != END_OF_STREAM:
                raise pa.ArrowInvalid("the end of the stream is missing")

    return _read_table(path, batches(), sources, lang)


def _columns(path: Path, names: list[str], sources: Mapping[str, str], lang: str) -> list[str]:
    """The columns of a table that hold our fields.

    Raises:
        InputError: none for a field that is needed or that the user named.
    """
    needed = {"id"} | ({"lang"} if not lang else set()) | ({"text"} if sources.get("sentences") not in names else set())
    for name in FIELDS:
        source = sources.get(name, name)
        if source not in names and (name in needed or source != name):
            way_out = f"--field {name}=COLUMN" + (" or --lang" if name == "lang" else "")
            raise InputError(f'{path}: no column "{source}", only {", ".join(names)}; say which one with {way_out}')
    return sorted(set(sources.values()) & set(names))


def _read_table(path: Path, batches: Iterator, sources: Mapping[str, str], lang: str) -> Records:
    number = 0
    try:
        for batch, done in batches:
            # A flipped bit in a memory-mapped offset would crash the process, not raise.
            batch.validate(full=True)
            for first in range(0, batch.num_rows, ROWS):
                for row in batch.slice(first, ROWS).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _record(row, sources, lang), done
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged file after {number} rows ({error})") from None


def _read_trec(path: Path, sources: Mapping[str, str], lang: str) -> Records:
    """Documents without text, which the collections have, are left out and counted on stderr."""
    if not lang:
        raise InputError(
            f"{path}: TREC text does not say its language; name it with --lang of build_documents.py files"
        )
    parts: list[bytes] | None = None  # of the document that is open
    number = empty = 0
    for line_number, line, done in _lines(path):
        start = 0
        for edge in _EDGE.finditer(line):
            if not edge[1]:
                if parts is not None:
                    raise InputError(f"{path}: document {number + 1}: no </DOC> before line {line_number}")
                parts, start = [], edge.end()
            elif parts is not None:
                number += 1
                parts.append(line[start : edge.start()])
                record = _parse_trec(b"".join(parts), f"{path}: document {number}")
                parts = None
                if record["text"]:
                    yield f"{path}: document {number} ({record['id']})", record | {"lang": lang}, done
                else:
                    empty += 1
        if parts is not None:
            parts.append(line[start:])
    if parts is not None:
        raise InputError(f"{path}: document {number + 1}: the file ends before its </DOC>: half-copied?")
    if empty:
        print(f"{path}: left out {empty} of {number} documents, which have no <TEXT>", file=sys.stderr)


def _parse_trec(document: bytes, where: str) -> dict:
    try:
        markup = document.decode("utf-8")
    except UnicodeDecodeError:
        markup = document.decode("iso-8859-1")
    id_ = _plain(_element(markup, "DOCNO"))
    if not id_:
        raise InputError(f"{where}: has no <DOCNO>")
    titles = (" ".join(_plain(_element(markup, name)).split()) for name in _TITLES)
    text = "\n".join(filter(None, (_plain(match[2]) for match in _TEXT.finditer(markup))))
    return {"id": id_, "title": next(filter(None, titles), ""), "text": text}


def _element(markup: str, name: str) -> str:
    """The content of the first element of that name, or ""."""
    match = re.search(rf"<{name}(?:\s[^<>]*)?>(.*?)</{name}\s*>", markup, re.IGNORECASE | re.DOTALL)
    return match[1] if match else ""


def _plain(markup: str) -> str:
    """Text without tags and entities. Tags and blank lines end a line; other line breaks only wrap the text."""
    paragraphs = re.split(r"\n\s*\n", _TAG.sub("\n\n", _INLINE_TAG.sub("", markup)))
    return "\n".join(filter(None, (" ".join(html.unescape(paragraph).split()) for paragraph in paragraphs)))


_READERS = {
    (".jsonl", ".json", ".jsonl.gz", ".json.gz"): _read_json,
    (".parquet",): _read_parquet,
    tuple(f".{kind}{gz}" for kind in ("trec", "trectext", "sgml", "sgm") for gz in ("", ".gz")): _read_trec,
}
