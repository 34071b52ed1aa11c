"""Files of test collections: topics, relevance judgements (qrels) and runs, as trec_eval and their makers write them.

Owns formats and the order of a ranking; a score is a float32, and equal scores are ordered as trec_eval orders them, by
the larger document id first, so that the metrics of a run and of the file that holds it are the same. Refuses lines it
cannot read, by file and line; repairs nothing.
"""

import gzip
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, output_file

TOPIC_PARTS = ("title", "description", "narrative")

# topic -> document -> relevance (0 = judged and not relevant)
Qrels = dict[str, dict[str, int]]
# topic -> (document, score), best first
Run = dict[str, list[tuple[str, float]]]

_TOPIC = re.compile(r"<(top|topic)(?:\s[^<>]*)?>(.*?)</\1\s*>", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"<(?:num|identifier)>(.*?)(?=<)", re.IGNORECASE | re.DOTALL)
_MARKUP = re.compile(r"<[^<>]*>")
# CLEF before 2004 puts the language into the names of the elements: <EN-title>. TREC leaves them open.
_ELEMENTS = {"title": "title", "description": "desc(?:ription)?", "narrative": "narr(?:ative)?"}
_LABELS = re.compile(r"^\s*(?:Number|Topic|Description|Narrative):", re.IGNORECASE)


def read_topics(path: str | Path, lang: str, parts: Sequence[str] = TOPIC_PARTS[:2]) -> dict[str, str]:
    """The text of each topic by its id: the asked `parts`, each on a line of its own.

    Args:
        path: topics of TREC or CLEF (`<top>`, `<topic>`); `.jsonl` of BEIR (`_id`, `text`), MLDR and MIRACL (`query_id`,
            `query`) or NeuCLIR (`topics` in several languages, translations by machine only where there is no other);
            or `.tsv` with id and text. All also with `.gz`.
        lang: language that is asked for, where the file has several.
        parts: of `TOPIC_PARTS`; files with one text a topic have no parts.

    Raises:
        InputError: a file that cannot be read so, a topic twice, or one without text.
    """
    path = Path(path)
    kind = path.name.removesuffix(".gz")
    topics: dict[str, str] = {}
    if kind.endswith((".jsonl", ".json")):
        found = _json_topics(path, lang, parts)
    elif kind.endswith(".tsv"):
        found = ((where, *(line.split("\t", 1) if "\t" in line else (line, ""))) for where, line in _lines(path))
    else:
        found = _marked_topics(path, lang, parts)
    for where, id_, text in found:
        id_, text = id_.strip(), text.strip()
        if not id_ or not text:
            raise InputError(f'{where}: topic "{id_}" has no {"text" if id_ else "id"} in {lang} ({", ".join(parts)})')
        if id_ in topics:
            raise InputError(f'{where}: topic "{id_}" occurs twice')
        topics[id_] = text
    if not topics:
        raise InputError(f"{path}: holds no topics in {lang}")
    return topics


def _text_of(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except EOFError:
        raise InputError(f"{path}: damaged gzip file") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("iso-8859-1")  # CLEF's own encoding


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, line) of the lines that hold something."""
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record


def _marked_topics(path: Path, lang: str, parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for number, topic in enumerate(_TOPIC.finditer(_text_of(path)), start=1):
        where, body = f"{path}: topic {number}", topic[2]
        # The end of the last element, for those that are left open.
        id_ = _NUMBER.search(body + "<")
        texts = []
        for part in parts:
            opening = rf"<(?:{lang.split('-')[0]}-|[a-z]{{2}}-)?{_ELEMENTS[part]}(?:\s[^<>]*)?>"
            match = re.search(rf"{opening}(.*?)(?=<[/a-z])", body + "</", re.IGNORECASE | re.DOTALL)
            if match:
                texts.append(" ".join(html.unescape(_LABELS.sub("", _MARKUP.sub(" ", match[1]))).split()))
        yield where, _LABELS.sub("", id_[1]) if id_ else "", "\n".join(filter(None, texts))


def _json_topics(path: Path, lang: str, parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for where, record in _objects(path):
        id_ = next((record[name] for name in ("_id", "query_id", "topic_id", "id") if name in record), "")
        if "topics" not in record:
            text = next((record[name] for name in ("text", "query") if name in record), "")
        else:
            # NeuCLIR writes "zho" where we write "zh".
            fitting = [t for t in record["topics"] if str(t.get("lang", "")).startswith(lang.split("-")[0])]
            if not fitting:
                continue
            by_hand = [t for t in fitting if t.get("source") in ("original", "human translation")]
            chosen = (by_hand or fitting)[0]
            text = "\n".join(filter(None, (chosen.get(f"topic_{part}", "") for part in parts)))
        yield where, str(id_), str(text)


def read_qrels(path: str | Path) -> Qrels:
    """Judgements of TREC (topic, iteration, document, relevance), of BEIR (`.tsv` of query, document, score, with a
    header), or the positive and negative passages of MLDR and MIRACL (`.jsonl`).

    Raises:
        InputError: a line that is none of these, or no judgement at all.
    """
    path = Path(path)
    qrels: Qrels = {}
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for where, record in _objects(path):
            try:
                judged = [(p["docid"], 1) for p in record["positive_passages"]]
                judged += [(p["docid"], 0) for p in record.get("negative_passages") or ()]
                qrels.setdefault(str(record["query_id"]), {}).update((str(id_), value) for id_, value in judged[::-1])
            except (KeyError, TypeError):
                raise InputError(f"{where}: needs query_id and positive_passages with their docid") from None
    else:
        for number, (where, line) in enumerate(_lines(path)):
            fields = line.split()
            if number == 0 and fields[-1] == "score":
                continue
            try:
                topic, document, relevance = fields[0], fields[-2], int(fields[-1])
            except (ValueError, IndexError):
                fields = []
            if len(fields) not in (3, 4):
                raise InputError(f"{where}: not a judgement (topic, iteration, document, relevance as a whole number)")
            qrels.setdefault(topic, {})[document] = relevance
    if not qrels:
        raise InputError(f"{path}: holds no judgements")
    return qrels


def ordered(documents: Sequence[str], scores: Sequence[float]) -> list[tuple[str, float]]:
    """Documents with their scores as float32, in the order in which trec_eval sees them."""
    pairs = zip(documents, np.asarray(scores, dtype=np.float32).tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]), reverse=True)


def read_run(path: str | Path) -> Run:
    """A run file (topic, Q0, document, rank, score, name), ordered by score as trec_eval does; the ranks do not count.

    Raises:
        InputError: a line that is none of a run, a document twice for one topic, or no line at all.
    """
    path = Path(path)
    found: dict[str, dict[str, float]] = {}
    for where, line in _lines(path):
        fields = line.split()
        try:
            topic, document, score = fields[0], fields[2], float(fields[4])
        except (ValueError, IndexError):
            raise InputError(f"{where}: not a line of a run (topic, Q0, document, rank, score, name)") from None
        if document in found.setdefault(topic, {}):
            raise InputError(f'{where}: document "{document}" occurs twice for topic "{topic}"')
        found[topic][document] = score
    if not found:
        raise InputError(f"{path}: holds no ranking")
    return {topic: ordered(list(scores), list(scores.values())) for topic, scores in found.items()}


def write_run(path: str | Path, run: Run, name: str) -> None:
    """Write a run file that trec_eval reads to the same ranking; ranks count from 1.

    Raises:
        InputError: an id holds white space, which the format cannot.
    """
    tag = re.sub(r"\s+", "-", name)
    with output_file(path) as file:
        for topic, ranking in run.items():
            for rank, (document, score) in enumerate(ranking, start=1):
                if len(topic.split()) != 1 or len(document.split()) != 1:
                    raise InputError(f'{path}: the id "{topic}" or "{document}" holds white space: no run file can')
                # The shortest number that is this float32 again.
                file.write(f"{topic} Q0 {document} {rank} {np.float32(score)!s} {tag}\n")


def matched(topics: Mapping[str, str], qrels: Qrels) -> dict[str, str]:
    """Topics under the ids of the judgements: CLEF calls a topic "C141" in one file and "141" in the other."""
    if not topics.keys() & qrels.keys():
        short = {re.sub(r"\D", "", id_): text for id_, text in topics.items()}
        if len(short) == len(topics) and short.keys() & qrels.keys():
            return short
    return dict(topics)
