"""Labelled documents for classification: any documents with a label field, and MLDoc as its scripts write it.

Owns what is trained on, validated on and tested on, by rows of one list of documents. A group of comparable documents is
never on both sides: a model that maps versions of a document to one place would have seen the answers. Documents without
a label are left out and counted.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import FIELDS, Document, check_record
from hmde_dist.corpus.readers import read_records

MLDOC_LANGUAGES = {
    "chinese": "zh",
    "english": "en",
    "french": "fr",
    "german": "de",
    "italian": "it",
    "japanese": "ja",
    "russian": "ru",
    "spanish": "es",
}


@dataclass(frozen=True)
class Rows:
    """Which documents a head is trained on, validated on and tested on (row numbers)."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Labelled:
    """Documents with their labels, and how they are split."""

    documents: list[Document]
    labels: list[tuple[str, ...]]  # of each document; one, unless `many`
    many: bool  # any number of labels a document
    roles: list[str] | None = None  # "train", "validation" or "test"; None = a split of the ids by the seed
    left_out: dict[str, int] = field(default_factory=dict)

    def split(self, language: str, seed: int) -> Rows:
        """Training and validation documents of one language, test documents of all.

        Without given roles, a hash of (seed, id) makes a tenth of the ids validation and two tenths test.

        Raises:
            InputError: a part would be empty.
        """
        roles = self.roles or [_role(document.id, seed) for document in self.documents]
        here = np.array([document.lang == language for document in self.documents])
        roles = np.array(roles)
        rows = Rows(
            train=np.flatnonzero(here & (roles == "train")),
            validation=np.flatnonzero(here & (roles == "validation")),
            test=np.flatnonzero(roles == "test"),
        )
        if not len(rows.train) or not len(rows.test):
            languages = ", ".join(sorted({document.lang for document in self.documents}))
            raise InputError(
                f'--train-lang {language}: {len(rows.train)} documents in "{language}" to train on and {len(rows.test)} '
                f"to test on; the languages here are {languages}"
            )
        return rows


def _role(id_: str, seed: int) -> str:
    tenth = int.from_bytes(hashlib.sha256(f"{seed}:{id_}".encode()).digest()[:8], "big") % 10
    return "validation" if tenth == 0 else "test" if tenth < 3 else "train"


def read_labelled(
    paths: Iterable[Path], label_field: str, test_paths: Iterable[Path] = (), fields: Mapping[str, str] = {}
) -> Labelled:
    """Documents of any kind that `corpus.readers` reads, with a label each, or a list of them.

    Args:
        label_field: dotted path in the record, such as `topic`, `categories.0`, `eurovoc_concepts.level_1`.
        test_paths: documents to test on; without them the ids of `paths` are split by the seed.
        fields: what the source calls a field, by our name for it.

    Raises:
        InputError: no document has a label, some have one label and some a list, or an id is on both sides.
    """
    test_paths = list(test_paths)
    documents, labels, roles, kinds = [], [], [], {}
    left_out: Counter[str] = Counter()
    for part, side in ((paths, "train"), (test_paths, "test")):
        for where, record in read_records(part, fields, also=[label_field.split(".")[0]]):
            value = _walk(record, label_field)
            if value is None:
                left_out["documents without a label"] += 1
                continue
            many = isinstance(value, list)
            values = value if many else [value]
            if not all(isinstance(item, str | int) for item in values):
                raise InputError(f'{where}: "{label_field}" must be a label or a list of labels, not {value!r:.80}')
            kinds.setdefault(many, where)
            for document in _versions(record, where):
                documents.append(document)
                labels.append(tuple(map(str, values)))
                tenth = side == "train" and _role(document.id, 0) == "validation"
                roles.append("validation" if tenth else side)
    if not documents:
        raise InputError(f'--label-field {label_field}: no document has a "{label_field}"')
    if len(kinds) > 1:
        raise InputError(f'"{label_field}" is one label in {kinds[False]} and a list in {kinds[True]}')
    if test_paths:
        sides = {}
        for document, role in zip(documents, roles, strict=True):
            if sides.setdefault(document.id, role == "test") != (role == "test"):
                raise InputError(f'document "{document.id}" is both trained and tested on: take it out of one side')
    return Labelled(documents, labels, many=next(iter(kinds)), roles=roles if test_paths else None, left_out=left_out)


def _walk(record: Mapping, path: str):
    """The value at a dotted path; None where it ends early."""
    value = record
    for step in path.split("."):
        if isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def _versions(record: dict, where: str) -> Iterator[Document]:
    """The documents of a record: MultiEURLEX keeps the texts of all languages in one, by language."""
    ours = {name: value for name, value in record.items() if name in FIELDS and name != "categories"}
    if not isinstance(record.get("text"), Mapping):
        yield check_record(ours, where)
        return
    for lang, text in record["text"].items():
        if text:
            yield check_record({**ours, "lang": lang, "text": text}, where)


def read_mldoc(folder: Path, train_size: int = 1000) -> Labelled:
    """MLDoc (Schwenk & Li 2018) as its scripts write it: `english.train.1000`, `english.dev`, `english.test`, ..., a
    label, a tab and the text in each line.

    Raises:
        InputError: no such files, or a line without label.
    """
    documents, labels, roles = [], [], []
    left_out: Counter[str] = Counter()
    kinds = {f"train.{train_size}": "train", "dev": "validation", "test": "test"}
    files = [(folder / f"{name}.{ending}", name, ending) for name in MLDOC_LANGUAGES for ending in kinds]
    files = [found for found in files if found[0].is_file()]
    if not any(ending == "test" for _, _, ending in files):
        raise InputError(
            f"{folder}: no MLDoc: it needs english.train.{train_size}, english.dev, english.test, german.test, ..., as "
            "generate_all_documents.sh of facebookresearch/MLDoc writes them"
        )
    for path, name, ending in progress(files, desc=f"read {folder.name}", unit="file"):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                label, tab, text = line.decode("utf-8").rstrip("\r").partition("\t")
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8") from None
            if not line.strip():
                continue
            if not tab or not label:
                raise InputError(f"{path}:{number}: not a label, a tab and a text")
            if not text.strip():
                left_out["documents without text"] += 1
                continue
            documents.append(Document(id=f"{name}.{ending}:{number}", lang=MLDOC_LANGUAGES[name], text=text))
            labels.append((label,))
            roles.append(kinds[ending])
    return Labelled(documents, labels, many=False, roles=roles, left_out=left_out)
