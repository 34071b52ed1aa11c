"""Rankings of a test collection: exact search over all documents in bounded memory, re-ranking of given runs, metrics.

Owns what is ranked and scored; the metrics themselves are trec_eval's own code, through ir_measures. Systems differ only
in how they score (`evaluation.baselines`).
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.collection import Collection, Pair
from hmde_dist.evaluation.retrieval import Scorer
from hmde_dist.evaluation.significance import compare
from hmde_dist.evaluation.trec import Qrels, Run, ordered, read_run, write_run

# Name in reports -> name in ir_measures. MRR has no cut-off, as in trec_eval.
MEASURES = {"MAP": "AP", "nDCG@10": "nDCG@10", "nDCG@20": "nDCG@20", "R@100": "R@100", "R@1000": "R@1000", "MRR": "RR"}
TESTED = ("MAP", "nDCG@10")
QUERY_BLOCK, DOCUMENT_BLOCK = 256, 1 << 15

# The documents of one language, ready to be searched: their ids, and a scorer of queries (rows) against them (columns).
Index = tuple[list[str], Callable[[list[Document]], Scorer]]
# Documents and a folder for what does not fit in memory -> index.
System = Callable[[Iterable[Document], Path], Index]


def rank(score: Scorer, queries: int, ids: Sequence[str], depth: int) -> list[list[tuple[str, float]]]:
    """The `depth` best documents of each query by exact search, ordered as trec_eval orders them.

    Memory: scores of a block of queries against a block of documents, and the best so far.
    """
    place = np.empty(len(ids), dtype=np.int64)
    place[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))

    def best(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(scores) > depth:
            # All that tie with the last one are kept until the order of ids decides.
            kept = np.flatnonzero(scores >= np.partition(scores, -depth)[-depth])
            rows, scores = rows[kept], scores[kept]
        order = np.lexsort((place[rows], -scores))[:depth]
        return rows[order], scores[order]

    rankings = []
    blocks = -(-queries // QUERY_BLOCK) * -(-len(ids) // DOCUMENT_BLOCK)
    with progress(total=blocks, desc="rank", unit="block") as bar:
        for first in range(0, queries, QUERY_BLOCK):
            asked = np.arange(first, min(first + QUERY_BLOCK, queries))
            found = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in asked]
            for start in range(0, len(ids), DOCUMENT_BLOCK):
                rows = np.arange(start, min(start + DOCUMENT_BLOCK, len(ids)))
                scores = _checked(score(asked, rows))
                for number, (old_rows, old_scores) in enumerate(found):
                    found[number] = best(np.concatenate([old_rows, rows]), np.concatenate([old_scores, scores[number]]))
                bar.update()
            rankings += [[(ids[r], s) for r, s in zip(rows, scores.tolist(), strict=True)] for rows, scores in found]
    return rankings


def rerank(score: Scorer, topics: Sequence[str], ids: Sequence[str], given: Run, depth: int) -> Run:
    """The first `depth` documents of each topic of a given run in the order of new scores; what is deeper stays as it is.

    This is the paper's protocol with `depth` 100 (of the public code's CLEF evaluation).

    Args:
        ids: documents of the scorer's columns: at least those that are re-ranked.
    """
    row = {id_: number for number, id_ in enumerate(ids)}
    run: Run = {}
    for number, topic in enumerate(progress(topics, desc="rerank", unit="topic")):
        ranking = given.get(topic, [])
        head, tail = [id_ for id_, _ in ranking[:depth]], [id_ for id_, _ in ranking[depth:]]
        if not head:
            continue
        scores = _checked(score(np.array([number]), np.array([row[id_] for id_ in head])))[0]
        below = np.floor(scores.min()) - 1 - np.arange(len(tail))
        run[topic] = ordered(head, scores) + ordered(tail, below)
    return run


def _checked(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise InputError("the system gives scores that are no finite numbers: its vectors hold NaN or infinity")
    return scores.astype(np.float32, copy=False)


def values_of_queries(run: Run, qrels: Qrels) -> dict[str, np.ndarray]:
    """Every measure's value for each topic of the qrels, in their order; a topic that the run lacks has 0."""
    import ir_measures

    measures = {ir_measures.parse_measure(name): ours for ours, name in MEASURES.items()}
    place = {topic: number for number, topic in enumerate(qrels)}
    values = {name: np.zeros(len(qrels)) for name in MEASURES}
    scores = {topic: dict(ranking) for topic, ranking in run.items() if topic in place}
    for metric in ir_measures.pytrec_eval.iter_calc(list(measures), qrels, scores):
        values[measures[metric.measure]][place[metric.query_id]] = metric.value
    return values


def named(folders: Sequence[Path], taken: Iterable[str]) -> dict[str, Path]:
    """Folders by their names in tables: the last part of the path, the whole path where that is taken.

    Raises:
        InputError: a folder is named twice.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.name if folder.name not in {*taken, *found} else str(folder)
        if name in found or name in taken:
            raise InputError(f"{folder} is named twice, or like a system of ours: rename the folder")
        found[name] = folder
    return found


def given_run(folder: Path, pair: Pair) -> Run:
    """The run of a pair: the file itself, or FOLDER/en-de.run."""
    return read_run(folder / f"{pair.name}.run" if folder.is_dir() else folder)


def evaluate_collection(
    collection: Collection,
    systems: dict[str, System],
    *,
    depth: int = 1000,
    rerank_given: Path | None = None,
    rerank_depth: int = 100,
    beside: Sequence[Path] = (),
    runs: Path | None = None,
) -> dict:
    """Rankings of every system for every pair of a collection, their metrics, and tests of the first system.

    Args:
        depth: documents of a ranking.
        rerank_given: run file (of the one pair) or folder of run files to re-rank, in place of a search.
        rerank_depth: documents of a given ranking that are re-ranked.
        beside: folders of run files of other systems, scored and tested beside ours under the name of the folder.
        runs: folder to write `SYSTEM/PAIR.run` to.

    Returns:
        systems (macro, pairs, seconds), left_out by pair, and significance by measure.
    """
    given = {pair.name: given_run(rerank_given, pair) for pair in collection.pairs} if rerank_given else {}
    others = {
        name: {pair.name: given_run(folder, pair) for pair in collection.pairs}
        for name, folder in named(beside, systems).items()
    }
    rankings, seconds = {}, {}
    left_out = {pair.name: dict(pair.left_out) for pair in collection.pairs}
    for name, system in systems.items():
        began = time.perf_counter()
        rankings[name] = {}
        for target in dict.fromkeys(pair.target for pair in collection.pairs):
            pairs = [pair for pair in collection.pairs if pair.target == target]
            wanted = {id_ for pair in pairs for id_ in _candidates(pair, given, rerank_depth)} if given else None
            documents = collection.documents(target) if wanted is None else _only(collection, target, wanted)
            # On the machine's temporary disk ($TMPDIR).
            with tempfile.TemporaryDirectory(prefix="hmde-index-") as folder:
                ids, scorer = system(documents, Path(folder))
                _check_ids(ids, pairs, wanted is None, left_out)
                for pair in pairs:
                    score, topics = scorer(pair.queries()), list(pair.topics)
                    if given:
                        run = rerank(score, topics, ids, given[pair.name], rerank_depth)
                    else:
                        run = dict(zip(topics, rank(score, len(topics), ids, depth), strict=True))
                    rankings[name][pair.name] = run
                    if runs:
                        write_run(runs / re.sub(r"[\s/]+", "-", name).strip("-") / f"{pair.name}.run", run, name)
        seconds[name] = round(time.perf_counter() - began, 2)
    report = scored(collection.pairs, rankings | ({"given run": given} if given else {}) | others)
    for name, value in seconds.items():
        report["systems"][name]["seconds"] = value
    return report | {"left_out": left_out}


def _candidates(pair: Pair, given: dict[str, Run], depth: int) -> set[str]:
    """The documents of a pair that are re-ranked."""
    found = {id_ for topic in pair.topics for id_, _ in given[pair.name].get(topic, [])[:depth]}
    if not found:
        raise InputError(f"--rerank: the run of {pair.name} ranks nothing for the topics of the collection")
    return found


def _only(collection: Collection, language: str, wanted: set[str]) -> Iterator[Document]:
    """The documents that are re-ranked; refuses to end without some of them."""
    lacking = set(wanted)
    for document in collection.documents(language):
        if document.id in wanted:
            lacking.discard(document.id)
            yield document
    if lacking:
        raise InputError(
            f"--rerank: ranks {len(lacking)} documents that the collection lacks in {language}, such as "
            f'"{min(lacking)}"'
        )


def _check_ids(ids: list[str], pairs: list[Pair], searched: bool, left_out: dict[str, dict[str, int]]) -> None:
    """Refuse documents that cannot be those that were judged; note relevant ones that are missing."""
    known = set(ids)
    if len(known) < len(ids):
        raise InputError(f"documents in {pairs[0].target}: an id occurs twice, so no judgement says which is meant")
    for pair in pairs if searched else []:
        relevant = {id_ for judged in pair.qrels.values() for id_, value in judged.items() if value > 0}
        if not relevant & known:
            raise InputError(f"{pair.name}: none of the relevant documents is in the collection; is it the right one?")
        if relevant - known:
            left_out[pair.name]["relevant documents that the collection lacks"] = len(relevant - known)


def scored(pairs: Sequence[Pair], rankings: dict[str, dict[str, Run]]) -> dict:
    """Metrics of every system and pair, macro averages, and tests of the first system against each other one."""
    values = {
        name: {pair.name: values_of_queries(runs[pair.name], pair.qrels) for pair in pairs}
        for name, runs in rankings.items()
    }
    systems = {}
    for name, found in values.items():
        by_pair = {
            pair: {measure: float(v.mean()) for measure, v in measured.items()} | {"queries": len(measured["MAP"])}
            for pair, measured in found.items()
        }
        macro = {measure: float(np.mean([m[measure] for m in by_pair.values()])) for measure in MEASURES}
        macro["queries"] = sum(m["queries"] for m in by_pair.values())
        systems[name] = {"macro": macro, "pairs": by_pair}
    subject = next(iter(rankings))
    significance = {
        measure: compare(
            {name: {pair: m[measure] for pair, m in found.items()} for name, found in values.items()}, subject
        )
        for measure in TESTED
    }
    return {"systems": systems, "significance": significance}
