"""Documents: the JSON-lines schema, its checks, groups of comparable documents, the train/validation/test split.

A document is one line `{"id", "lang", "title"?, "text" | "sentences", "categories"?}`; documents that share an
`id` are versions of one document in several languages: a *group*. Other keys are kept out and are no error.
This module refuses wrong lines, naming file and line; it never repairs them.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hmde_dist.command import InputError, output_folder, progress

LANGUAGE_CODE = re.compile(r"[a-z]{2,8}(-[a-z0-9]{1,8})*")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One document in one language; exactly one of `text` and `sentences` holds its content."""

    id: str
    lang: str
    title: str = ""
    text: str = ""
    sentences: tuple[str, ...] = ()
    categories: tuple[str, ...] = field(default=())

    def as_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if v}, ensure_ascii=False)


def parse_document(line: bytes, where: str) -> Document:
    """One JSON line as a `Document`; `where` (file:line) opens every message.

    Raises:
        InputError: not UTF-8, not a JSON object, or a field that is missing, empty or of the wrong type.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (byte {error.start} is 0x{line[error.start]:02x}); re-encode the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for key in ("id", "lang"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise InputError(f'{where}: a document needs a non-empty string "{key}"')
    if not LANGUAGE_CODE.fullmatch(record["lang"]):
        raise InputError(f'{where}: "lang" is "{record["lang"]}"; use a lower-case code such as "en", "pt-br", "zh-cn"')
    for key in ("title", "text"):
        if not isinstance(record.get(key), str | None):
            raise InputError(f'{where}: "{key}" must be a string')
    for key in ("sentences", "categories"):
        value = [] if record.get(key) is None else record[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f'{where}: "{key}" must be a list of strings')
    document = Document(
        id=record["id"],
        lang=record["lang"],
        title=record.get("title") or "",
        text=record.get("text") or "",
        sentences=tuple(record.get("sentences") or ()),
        categories=tuple(record.get("categories") or ()),
    )
    for key in ("id", "title", "text", "sentences", "categories"):
        value = getattr(document, key)
        if not all(map(_is_unicode, (value,) if isinstance(value, str) else value)):
            raise InputError(f'{where}: "{key}" has half a surrogate pair (\\ud800 to \\udfff), which is no character')
    if document.text and document.sentences:
        raise InputError(f'{where}: both "text" and "sentences"; keep one')
    if not any(part.strip() for part in (document.text, *document.sentences)):
        raise InputError(
            f'{where}: document "{document.id}" ({document.lang}) is empty: it needs "text" or "sentences"'
        )
    return document


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of JSON-lines files (plain or .gz), checked, with a progress bar over bytes read."""
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path}: no such file of documents")
        with (
            open(path, "rb") as raw,
            progress(total=path.stat().st_size, desc=f"read {path.name}", unit="B", unit_scale=True) as bar,
        ):
            lines = gzip.open(raw) if path.suffix == ".gz" else raw
            count = 0
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield parse_document(line, f"{path}:{number}")
                        count += 1
                    bar.update(raw.tell() - bar.n)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise InputError(f"{path}: damaged gzip file after {count} documents ({error})") from None
        if not count:
            raise InputError(f"{path}: holds no documents")


def group_documents(documents: Iterable[Document]) -> dict[str, dict[str, Document]]:
    """Documents by id, then by language, both in sorted order.

    Raises:
        InputError: an id has two documents in one language.
    """
    groups: dict[str, dict[str, Document]] = {}
    for document in documents:
        versions = groups.setdefault(document.id, {})
        if document.lang in versions:
            raise InputError(f'document "{document.id}" occurs twice in "{document.lang}": keep one')
        versions[document.lang] = document
    return {id_: dict(sorted(groups[id_].items())) for id_ in sorted(groups)}


def split_of(group_id: str) -> str:
    """`train` (80 %), `validation` (10 %) or `test` (10 %), by a hash of the id: the same everywhere, for ever."""
    bucket = int.from_bytes(hashlib.sha256(group_id.encode()).digest()[:8], "big") % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def write_splits(documents: Iterable[Document], out: str | Path) -> dict:
    """Write `train|validation|test.jsonl.gz` and `report.json` under `out`, ids with one language left out.

    Returns the report: documents per split and language, and what was left out.
    """
    groups = group_documents(documents)
    kept = {id_: versions for id_, versions in groups.items() if len(versions) > 1}
    report: dict = {"groups": len(kept), "left_out_one_language": len(groups) - len(kept), "splits": {}}
    if not kept:
        raise InputError("no id occurs in two languages: comparable documents must share their id")
    with output_folder(out) as folder:
        for split in SPLITS:
            chosen = [versions for id_, versions in kept.items() if split_of(id_) == split]
            languages: dict[str, int] = {}
            # A fixed mtime makes equal documents equal files.
            with gzip.GzipFile(folder / f"{split}.jsonl.gz", "wb", compresslevel=6, mtime=0) as file:
                for versions in chosen:
                    for document in versions.values():
                        file.write((document.as_json() + "\n").encode())
                        languages[document.lang] = languages.get(document.lang, 0) + 1
            report["splits"][split] = {"groups": len(chosen), "documents": dict(sorted(languages.items()))}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
