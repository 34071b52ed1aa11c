"""Test collections: documents in some languages, topics, judgements, and the language pairs to score.

A collection is a BEIR folder, or a YAML file that says where its parts are:

    documents: {de: [sda94.sgml, spiegel/*.sgml], fi: [aamulehti/*.sgml]}   # by language, relative to the YAML file
    topics: {en: topics-en.xml, de: topics-de.xml}                        # by language
    qrels: {de: qrels-de.txt, fi: qrels-fi.txt}                             # by language of the documents
    pairs: [en-de, en-fi, de-fi]        # topics-documents; missing = all
    query: [title, description]         # parts of a topic; this is the default, and the paper's
    fields: {id: docid}                 # what the documents' files call their fields, if not id, title, text

Owns what is judged and what is left out of the numbers, and counts it. Does not rank.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document, check_record
from hmde_dist.corpus.readers import read_records
from hmde_dist.evaluation.trec import Qrels, matched, read_qrels, read_topics


class Description(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid")

    documents: dict[str, list[str]] = Field(min_length=1)
    topics: dict[str, str] = Field(min_length=1)
    qrels: dict[str, str] = Field(min_length=1)
    pairs: list[str] | None = None
    query: list[Literal["title", "description", "narrative"]] = ["title", "description"]
    fields: dict[str, str] = {}


@dataclass(frozen=True)
class Pair:
    """Topics of one language over the documents of one (another or the same)."""

    source: str
    target: str
    topics: dict[str, str]  # text by id: those that are scored
    qrels: Qrels  # of the same ids
    left_out: dict[str, int]  # why topics are not scored -> how many

    @property
    def name(self) -> str:
        return f"{self.source}-{self.target}"

    def queries(self) -> list[Document]:
        return [Document(id=id_, lang=self.source, text=text) for id_, text in self.topics.items()]


@dataclass(frozen=True)
class Collection:
    pairs: list[Pair]
    paths: dict[str, list[Path]]  # of documents, by language
    fields: dict[str, str] = field(default_factory=dict)

    def documents(self, language: str) -> Iterator[Document]:
        """The documents of a language, the title as a first line of the text: what is searched.

        Those with neither title nor text cannot be found; they are left out and counted on stderr.
        """
        empty = 0
        for where, record in read_records(self.paths[language], self.fields, language):
            title, text = record.get("title") or "", record.get("text") or ""
            if isinstance(title, str) and isinstance(text, str) and not record.get("sentences"):
                record = record | {"text": f"{title}\n{text}"}
                if not record["text"].strip():
                    empty += 1
                    continue
            yield check_record(record, where)
        if empty:
            print(f"documents in {language}: left out {empty} without title and text", file=sys.stderr)


def open_collection(path: str | Path, pairs: list[str] | None = None) -> Collection:
    """The collection at `path`; documents are not read yet.

    Args:
        pairs: language pairs to score, in place of the collection's own; of a BEIR folder, which does not know its
            languages, the one pair that it is.

    Raises:
        InputError: something is missing, cannot be read, or does not fit together.
    """
    path = Path(path)
    if path.is_dir():
        return _beir(path, pairs)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        described = Description.model_validate(tree)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a YAML file or a BEIR folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors())
        raise InputError(f"{path}: {'; '.join(problems)}; see docs/evaluation.md") from None
    paths = {lang: _files(path, lang, patterns) for lang, patterns in described.documents.items()}
    qrels = {lang: read_qrels(path.parent / name) for lang, name in described.qrels.items()}
    topics = {lang: read_topics(path.parent / name, lang, described.query) for lang, name in described.topics.items()}
    names = pairs or described.pairs or [f"{a}-{b}" for a in topics for b in paths]
    chosen = []
    for name in names:
        fitting = [(a, b) for a in topics for b in paths if f"{a}-{b}" == name]
        if len(fitting) != 1:
            raise InputError(
                f'{path}: pair "{name}" is not topics in one of {", ".join(topics)} over documents in one of '
                f"{', '.join(paths)}"
            )
        ((source, target),) = fitting
        if target not in qrels:
            raise InputError(f'{path}: no qrels for documents in "{target}"')
        chosen.append(_judged(path, source, target, topics[source], qrels[target]))
    return Collection(chosen, paths, described.fields)


def _files(path: Path, language: str, patterns: list[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        files = [path.parent / pattern]
        if "*" in pattern:
            files = sorted(path.parent.glob(pattern))
        if not files or not all(file.exists() for file in files):
            raise InputError(f"{path}: documents.{language}: there is no {pattern} beside it")
        found += files
    return found


def _beir(folder: Path, pairs: list[str] | None) -> Collection:
    source, target = "und", "und"
    if pairs:
        parts = pairs[0].split("-")
        if len(pairs) != 1 or len(parts) != 2:
            raise InputError("--pairs: a BEIR folder is one pair, such as en-de: queries in en, documents in de")
        source, target = parts
    corpus = [folder / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (folder / name).is_file()]
    queries = [folder / name for name in ("queries.jsonl", "queries.jsonl.gz") if (folder / name).is_file()]
    judged = folder / "qrels" / "test.tsv"
    if not judged.is_file():
        others = sorted((folder / "qrels").glob("*.tsv"))
        judged = others[0] if len(others) == 1 else judged
    if not corpus or not queries or not judged.is_file():
        raise InputError(f"{folder}: no BEIR folder: it needs corpus.jsonl, queries.jsonl and qrels/test.tsv")
    topics = read_topics(queries[0], source)
    pair = _judged(folder, source, target, topics, read_qrels(judged))
    return Collection([pair], {target: corpus[:1]}, {"id": "_id"})


def _judged(path: Path, source: str, target: str, topics: dict[str, str], qrels: Qrels) -> Pair:
    """Only topics with a relevant document are scored: of the others every ranking is as good."""
    topics = matched(topics, qrels)
    scored = {id_: text for id_, text in topics.items() if any(v > 0 for v in qrels.get(id_, {}).values())}
    if not scored:
        raise InputError(f"{path}: {source}-{target}: no topic has a relevant document; do the qrels belong to them?")
    left_out = {
        "topics without judgements": sum(id_ not in qrels for id_ in topics),
        "topics without a relevant document": sum(id_ in qrels for id_ in topics) - len(scored),
        "judged topics without a text": sum(id_ not in topics for id_ in qrels),
    }
    left_out = {why: count for why, count in left_out.items() if count}
    return Pair(source, target, scored, {id_: qrels[id_] for id_ in scored}, left_out)
