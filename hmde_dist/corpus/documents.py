"""Documents: the schema of a record, its checks, groups of comparable documents, the train/validation/test split.

A document is one record `{"id", "lang", "title"?, "text" | "sentences", "categories"?}`; documents that share an
`id` are versions of one document in several languages: a *group*. Other keys are kept out and are no error.
This module refuses wrong records, naming file and place; it never repairs them. `corpus.readers` opens the files.
"""

import gzip
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from hmde_dist.command import InputError, output_folder
from hmde_dist.corpus.buckets import Dealer, read_bucket

LANGUAGE_CODE = re.compile(r"[a-z]{2,8}(-[a-z0-9]{1,8})*")
SPLITS = ("train", "validation", "test")
BUCKETS = 256  # that documents are dealt into to be grouped


@dataclass(frozen=True, slots=True)
class Document:
    """One document in one language; exactly one of `text` and `sentences` holds its content."""

    id: str
    lang: str
    title: str = ""
    text: str = ""
    sentences: tuple[str, ...] = ()
    categories: tuple[str, ...] = field(default=())

    def as_json(self, **other: str) -> str:
        """One JSON line; `other` are keys that training does not read."""
        return json.dumps({k: v for k, v in asdict(self).items() if v} | other, ensure_ascii=False)


FIELDS = tuple(Document.__dataclass_fields__)


def parse_document(line: bytes, where: str) -> Document:
    """One JSON line as a `Document`; `where` (file:line) opens every message.

    Raises:
        InputError: see `parse_record` and `check_record`.
    """
    return check_record(parse_record(line, where), where)


def parse_record(line: bytes, where: str) -> dict:
    """One JSON line as a dictionary, its content unchecked.

    Raises:
        InputError: not UTF-8, not JSON or not a JSON object.
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
    return record


def check_record(record: Mapping, where: str) -> Document:
    """A record from any kind of file as a `Document`; `where` opens every message. A whole number as id is no error.

    Raises:
        InputError: a field is missing, empty or of the wrong type.
    """
    if type(record.get("id")) is int:
        record = {**record, "id": str(record["id"])}
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


def read_groups(folders: Sequence[Path], bucket: int) -> Iterator[tuple[str, list[Document]]]:
    """(id, its documents by language) of one bucket of dealt documents (see `corpus.buckets`), by id.

    Raises:
        InputError: an id has two documents in one language.
    """
    for id_, documents in read_bucket(folders, bucket, _parse_dealt):
        documents.sort(key=lambda document: document.lang)
        for one, other in pairwise(documents):
            if one.lang == other.lang:
                raise InputError(f'document "{id_}" occurs twice in "{one.lang}": keep one')
        yield id_, documents


def _parse_dealt(line: bytes) -> tuple[str, Document]:
    document = parse_document(line, "document")
    return document.id, document


def split_of(group_id: str) -> str:
    """`train` (80 %), `validation` (10 %) or `test` (10 %), by a hash of the id: the same everywhere, for ever."""
    bucket = int.from_bytes(hashlib.sha256(group_id.encode()).digest()[:8], "big") % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def write_splits(documents: Iterable[Document], out: str | Path) -> dict:
    """Write `train|validation|test.jsonl.gz` and `report.json` under `out`, ids with one language left out.

    Memory holds one of `BUCKETS` parts of the documents. Returns the report: documents per split and language, and what
    was left out.

    Raises:
        InputError: an id has two documents in one language, or none has two languages.
    """
    splits = {split: {"groups": 0, "documents": Counter()} for split in SPLITS}
    alone = 0
    with output_folder(out) as folder:
        work = folder / "work"
        work.mkdir()
        dealer = Dealer(work, BUCKETS)
        for document in documents:
            dealer.deal(document.id, document.as_json().encode() + b"\n")
        dealer.close()
        # A fixed mtime makes equal documents equal files.
        files = {split: gzip.GzipFile(folder / f"{split}.jsonl.gz", "wb", compresslevel=6, mtime=0) for split in SPLITS}
        for bucket in range(BUCKETS):
            for id_, versions in read_groups([work], bucket):
                if len(versions) < 2:
                    alone += 1
                    continue
                split = split_of(id_)
                splits[split]["groups"] += 1
                for document in versions:
                    files[split].write((document.as_json() + "\n").encode())
                    splits[split]["documents"][document.lang] += 1
        for file in files.values():
            file.close()
        shutil.rmtree(work)
        for counts in splits.values():
            counts["documents"] = dict(sorted(counts["documents"].items()))
        groups = sum(counts["groups"] for counts in splits.values())
        if not groups:
            raise InputError("no id occurs in two languages: comparable documents must share their id")
        report = {"groups": groups, "left_out_one_language": alone, "splits": splits}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
