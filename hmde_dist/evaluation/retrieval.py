"""Cross-lingual retrieval of comparable documents: for each document of language A, rank the documents of language B.

The right answer is the document of the same id. Ranks are pessimistic at ties, so a model that maps everything to one
vector scores nothing.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document

METRICS = ("R@1", "R@10", "MRR@10", "nDCG@10")
QUERY_BLOCK = 1024

# Scores [queries, candidates] of rows given by number.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """What is ranked: one row per document."""

    ids: list[str]
    languages: list[str]


def cosine_scorer(vectors: np.ndarray) -> Scorer:
    """Scores of row vectors [N, W] by cosine, in fp32."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = unit.astype(np.float32)
    return lambda queries, candidates: unit[queries] @ unit[candidates].T


def language_pairs(candidates: Candidates, chosen: list[str] | None = None) -> list[tuple[str, str]]:
    """The pairs to score: `chosen` ("de-en"; split so that both halves are languages here), else every ordered pair.

    Raises:
        InputError: a pair names a language that is not here.
    """
    languages = sorted(set(candidates.languages))
    if not chosen:
        return [(a, b) for a in languages for b in languages if a != b]
    pairs = []
    for name in chosen:
        parts = name.split("-")
        # Codes contain hyphens themselves: "pt-br-en".
        options = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
        fitting = [pair for pair in options if pair[0] in languages and pair[1] in languages]
        if len(fitting) != 1:
            raise InputError(f'--pairs: "{name}" is not two of the languages {", ".join(languages)}')
        pairs += fitting
    return pairs


def retrieval(candidates: Candidates, score: Scorer, pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Metrics and number of queries of each pair ("de-en": de queries, en candidates) that has a query."""
    rows: dict[str, dict[str, int]] = {}
    for row, (id_, language) in enumerate(zip(candidates.ids, candidates.languages, strict=True)):
        rows.setdefault(language, {})[id_] = row
    results = {}
    for source, target in pairs:
        ids = [id_ for id_ in rows[source] if id_ in rows[target]]
        if not ids:
            continue
        queries = np.array([rows[source][id_] for id_ in ids])
        pool = np.array(list(rows[target].values()))
        place = {id_: number for number, id_ in enumerate(rows[target])}
        right = np.array([place[id_] for id_ in ids])
        ranks = []
        for first in range(0, len(queries), QUERY_BLOCK):
            block = slice(first, first + QUERY_BLOCK)
            scores = score(queries[block], pool)
            positive = np.take_along_axis(scores, right[block, None], axis=1)
            # Not `>=`: a score that is no number must not rank above the right answer's.
            ranks.append((~(scores < positive)).sum(axis=1))
        results[f"{source}-{target}"] = metrics_of_ranks(np.concatenate(ranks))
    return results


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Means over queries of the metrics, for the rank (1 = best) of the one right answer."""
    within = ranks <= 10
    return {
        "R@1": float((ranks == 1).mean()),
        "R@10": float(within.mean()),
        "MRR@10": float(np.where(within, 1 / ranks, 0).mean()),
        "nDCG@10": float(np.where(within, 1 / np.log2(1 + ranks), 0).mean()),
        "queries": len(ranks),
    }


def macro(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Unweighted mean over pairs, and the number of queries of all pairs together."""
    if not results:
        raise InputError("no document occurs in both languages of any pair: nothing to evaluate")
    means = {metric: float(np.mean([pair[metric] for pair in results.values()])) for metric in METRICS}
    return means | {"queries": sum(pair["queries"] for pair in results.values())}


def evaluate_groups(
    documents: list[Document], systems: dict[str, Callable[[list[Document]], Scorer]], chosen: list[str] | None = None
) -> dict:
    """Retrieval of every system over groups of comparable documents: macro averages, pairs and seconds.

    Args:
        chosen: pairs to score, as `language_pairs` takes them.

    Raises:
        InputError: an id has two documents in one language.
    """
    candidates = Candidates([d.id for d in documents], [d.lang for d in documents])
    keys = Counter(zip(candidates.ids, candidates.languages, strict=True))
    for (id_, language), times in keys.items():
        if times > 1:
            raise InputError(f'document "{id_}" occurs twice in "{language}": keep one')
    pairs = language_pairs(candidates, chosen)
    report = {"documents": len(documents), "systems": {}}
    for name, scorer in systems.items():
        began = time.perf_counter()
        results = retrieval(candidates, scorer(documents), pairs)
        report["systems"][name] = {
            "macro": macro(results),
            "seconds": round(time.perf_counter() - began, 2),
            "pairs": results,
        }
    return report
