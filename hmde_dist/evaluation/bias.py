"""What a document vector favours: places in the document, languages in the pool, lengths.

Position: a document of several segments, each taken from another document, is encoded in every rotation, so that every
segment stands once at every place; how near the vector is to each segment's own vector, by place, has no slope in a model
that does not care. With one segment in another language it shows what a foreign part is worth. (After the permutation
test on comparable Wikipedia articles of arXiv 2601.16934.)
Language: documents look for their versions in a pool of all languages together.
Length: documents are cut short, or buried in others.

Everything here takes an `Encoder`, documents -> vectors [N, W], so laws can be tested on encoders made for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.evaluation.baselines import Encoder
from hmde_dist.evaluation.retrieval import (
    Candidates,
    cosine_scorer,
    language_pairs,
    macro,
    metrics_of_ranks,
    retrieval,
)
from hmde_dist.evaluation.significance import mean_interval, paired_tests

SEGMENTS = 4
NEIGHBOURS = 10
CUTS = (1, 2, 4, 8)  # sentences that are kept
BURIALS = (2, 4)  # documents in one

# Groups of versions of one document: language -> sentences.
Groups = dict[str, dict[str, tuple[str, ...]]]


def sentences_of(documents: Sequence[Document]) -> Groups:
    """The documents as sentences, by id and language.

    Raises:
        InputError: an id has two documents in one language.
    """
    groups: Groups = {}
    for document in documents:
        versions = groups.setdefault(document.id, {})
        if document.lang in versions:
            raise InputError(f'document "{document.id}" occurs twice in "{document.lang}": keep one')
        versions[document.lang] = document.sentences or tuple(split_sentences(document.text, document.lang))
    return groups


def sample(groups: Groups, count: int, seed: int) -> Groups:
    """At most `count` groups, those with the most languages first, else by chance; in their own order."""
    draws = np.random.default_rng(seed).random(len(groups))
    ranked = sorted(zip(groups, draws, strict=True), key=lambda pair: (-len(groups[pair[0]]), pair[1]))
    chosen = {id_ for id_, _ in ranked[:count]}
    return {id_: versions for id_, versions in groups.items() if id_ in chosen}


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def prefix(sentences: Sequence[str], room: int, size: Callable[[Sequence[str]], Sequence[int]]) -> tuple[str, ...]:
    """The longest beginning of the sentences that takes at most `room` of the encoder's places; maybe nothing."""
    taken = np.cumsum(size(sentences))
    return tuple(sentences[: int((taken <= room).sum())])


def position_bias(
    groups: Groups,
    encode: Encoder,
    places: int,
    size: Callable[[Sequence[str]], Sequence[int]] = lambda sentences: [1] * len(sentences),
    seed: int = 0,
) -> dict:
    """Cosine of a document's vector with the vectors of its segments, by the place of the segment, for every language;
    and what a segment loses when it stands in another language than the rest, for every pair.

    A document has `SEGMENTS` segments, the beginnings of as many documents, and fits into the encoder whole.

    Args:
        places: sentences that the encoder reads of a document.
        size: how many of them each of some sentences takes (long ones are cut in pieces).

    Returns:
        languages: by language with enough documents cosine_by_place, slope (change of the cosine per place; its interval and p of a
            randomisation test over documents), documents.
        foreign: by pair "de-en" (one segment in de, the others in en) difference of the cosine to that of the same
            segment in en, its interval, p and documents.
    """
    segments = {
        id_: {lang: cut for lang, text in versions.items() if (cut := prefix(text, places // SEGMENTS, size))}
        for id_, versions in groups.items()
    }
    languages = sorted({lang for versions in segments.values() for lang in versions})
    sets = {lang: _sets([i for i, versions in segments.items() if lang in versions], lang, seed) for lang in languages}
    wanted: list[Document] = []

    def row(lang: str, parts: Sequence[tuple[str, ...]]) -> int:
        wanted.append(Document(id=str(len(wanted)), lang=lang, sentences=tuple(s for part in parts for s in part)))
        return len(wanted) - 1

    alone = {
        (id_, lang): row(lang, [segment]) for id_, versions in segments.items() for lang, segment in versions.items()
    }
    rotated = {
        lang: np.array(
            [
                [row(lang, [segments[i][lang] for i in ids[turn:] + ids[:turn]]) for turn in range(SEGMENTS)]
                for ids in sets[lang]
            ],
            dtype=np.int64,
        ).reshape(-1, SEGMENTS)
        for lang in languages
    }
    # In turn `turn` the segment at the first place is number `turn` of the set: that one is replaced.
    mixed = {
        (other, lang): [
            (
                number,
                turn,
                row(lang, [segments[ids[turn]][other]] + [segments[i][lang] for i in ids[turn + 1 :] + ids[:turn]]),
            )
            for number, ids in enumerate(sets[lang])
            for turn in range(SEGMENTS)
            if other in segments[ids[turn]]
        ]
        for other in languages
        for lang in languages
        if other != lang
    }
    report = {"segments": SEGMENTS, "languages": {}, "foreign": {}, "macro": {}}
    if not any(sets.values()):
        return report
    vectors = unit(encode(wanted))
    for lang in languages:
        if not sets[lang]:
            continue
        cosines = np.empty((len(sets[lang]), SEGMENTS, SEGMENTS))  # set, turn, place
        for number, ids in enumerate(sets[lang]):
            parts = vectors[[alone[id_, lang] for id_ in ids]]
            for turn in range(SEGMENTS):
                order = [(turn + place) % SEGMENTS for place in range(SEGMENTS)]
                cosines[number, turn] = parts[order] @ vectors[rotated[lang][number, turn]]
        # Over all turns every segment was at every place.
        by_place = cosines.mean(axis=1)
        slopes = np.polynomial.polynomial.polyfit(np.arange(SEGMENTS), by_place.T, 1)[1]
        report["languages"][lang] = {
            "cosine_by_place": by_place.mean(axis=0).tolist(),
            **_tested("slope", slopes),
            "documents": SEGMENTS * len(sets[lang]),
        }
    for (other, lang), rows in mixed.items():
        differences = [
            vectors[alone[sets[lang][number][turn], other]] @ vectors[row_]
            - vectors[alone[sets[lang][number][turn], lang]] @ vectors[rotated[lang][number, turn]]
            for number, turn, row_ in rows
        ]
        if differences:
            report["foreign"][f"{other}-{lang}"] = {**_tested("difference", differences), "documents": len(rows)}
    report["macro"]["slope"] = float(np.mean([found["slope"] for found in report["languages"].values()]))
    if report["foreign"]:
        report["macro"]["foreign"] = float(np.mean([found["difference"] for found in report["foreign"].values()]))
    return report


def _sets(ids: list[str], language: str, seed: int) -> list[list[str]]:
    """Disjoint sets of `SEGMENTS` ids in an order drawn by the seed and the language."""
    order = np.random.default_rng([seed, *language.encode()]).permutation(len(ids))
    shuffled = [ids[number] for number in order]
    return [shuffled[first : first + SEGMENTS] for first in range(0, len(ids) - SEGMENTS + 1, SEGMENTS)]


def _tested(name: str, values: Sequence[float]) -> dict:
    """The mean of values, its interval, and p of a randomisation test of it against zero."""
    values = np.asarray(values, dtype=np.float64)
    # Rounding is no bias.
    values = np.where(np.abs(values) < 1e-6, 0.0, values)
    tests = paired_tests(values, np.zeros_like(values))
    return {name: float(values.mean()), "interval": mean_interval(values), "p": tests["p_randomisation"]}


def language_bias(documents: list[Document], encode: Encoder) -> dict:
    """Retrieval from one pool of all languages, the query's own too.

    Returns:
        languages: by language of the query `same_language`, the share of its own language among the
            `NEIGHBOURS` nearest beyond what the pool would give by chance (0: none; 1: only its own language;
            negative: it is avoided); ties count by their share.
        pairs: "de-en" -> `mixed` and `alone`: metrics of the version in en, among the wrong documents of all
            languages and among those in en.
        macro: means over languages and pairs of same_language and of both MRR@10; `gap`, the largest difference of
            the mixed MRR@10 between two languages of the answer, averaged over languages of the query.
    """
    ids = np.array([document.id for document in documents])
    languages = np.array([document.lang for document in documents])
    candidates = Candidates(ids.tolist(), languages.tolist())
    score = cosine_scorer(encode(documents))
    everything = np.arange(len(documents))
    by_language, ranks = {}, {}
    for query in progress(everything, desc="mixed pool", unit="query"):
        lang, own = languages[query], languages == languages[query]
        scores = np.nan_to_num(score(np.array([query]), everything)[0], nan=-np.inf)
        wrong = ids != ids[query]
        for right in np.flatnonzero(~wrong & ~own):
            # As in `retrieval`: at ties the right answer is the last.
            rank = 1 + (~(scores[wrong] < scores[right])).sum()
            ranks.setdefault(f"{lang}-{languages[right]}", []).append(rank)
        if (wanted := min(NEIGHBOURS, own.sum() - 1)) and not own.all():
            pool = everything != query
            threshold = np.partition(scores[pool], -wanted)[-wanted]
            above, tied = pool & (scores > threshold), pool & (scores == threshold)
            share = ((above & own).sum() + (wanted - above.sum()) * (tied & own).sum() / tied.sum()) / wanted
            chance = (own.sum() - 1) / pool.sum()
            by_language.setdefault(str(lang), []).append((share - chance) / (1 - chance))
    pairs = [pair for pair in language_pairs(candidates) if "-".join(pair) in ranks]
    if not pairs:
        raise InputError("language bias needs documents that occur in two languages")
    alone = retrieval(candidates, score, pairs)
    mixed = {pair: metrics_of_ranks(np.array(ranks[pair])) for pair in alone}
    gaps = []
    for lang in {source for source, _ in pairs}:
        answers = [mixed[f"{a}-{b}"]["MRR@10"] for a, b in pairs if a == lang]
        gaps.append(max(answers) - min(answers))
    return {
        "languages": {
            lang: {"same_language": float(np.mean(found)), "interval": mean_interval(found), "queries": len(found)}
            for lang, found in by_language.items()
        },
        "pairs": {pair: {"mixed": mixed[pair], "alone": alone[pair]} for pair in alone},
        "macro": {
            "same_language": float(np.mean([np.mean(found) for found in by_language.values()])) if by_language else 0.0,
            "MRR@10 mixed": macro(mixed)["MRR@10"],
            "MRR@10 alone": macro(alone)["MRR@10"],
            "gap": float(np.mean(gaps)),
        },
    }


def length_stress(groups: Groups, encode: Encoder) -> dict:
    """Retrieval of whole documents by queries that are cut short or buried, macro averages over pairs, and the pairs.

    Returns:
        "whole"; "first 1 sentences", ...: the query's beginning; "before 1 others", "after 1 others", ...: the whole
        query with so many other documents of its language behind or in front of it.
    """
    versions = [(id_, lang, text) for id_, group in groups.items() for lang, text in group.items()]
    whole = [Document(id=id_, lang=lang, sentences=text) for id_, lang, text in versions]
    by_language: dict[str, list[Document]] = {}
    for document in whole:
        by_language.setdefault(document.lang, []).append(document)
    place = {lang: {d.id: n for n, d in enumerate(others)} for lang, others in by_language.items()}

    def with_others(document: Document, count: int, in_front: bool) -> Document:
        others = by_language[document.lang]
        start = place[document.lang][document.id]
        added = tuple(s for step in range(1, count + 1) for s in others[(start + step) % len(others)].sentences)
        return replace(document, sentences=added + document.sentences if in_front else document.sentences + added)

    stressed = {"whole": whole}
    for cut in CUTS:
        stressed[f"first {cut} sentences"] = [replace(d, sentences=d.sentences[:cut]) for d in whole]
    for size in BURIALS:
        if size <= min(map(len, by_language.values())):
            stressed[f"before {size - 1} others"] = [with_others(d, size - 1, in_front=False) for d in whole]
            stressed[f"after {size - 1} others"] = [with_others(d, size - 1, in_front=True) for d in whole]
    candidates = Candidates([d.id for d in whole], [d.lang for d in whole])
    pairs = language_pairs(candidates)
    targets = unit(encode(whole))
    report = {}
    for name, queries in stressed.items():
        asked = targets if name == "whole" else unit(encode(queries))
        results = retrieval(candidates, lambda q, c, asked=asked: asked[q] @ targets[c].T, pairs)
        report[name] = {"macro": macro(results), "pairs": results}
    return report


def evaluate_bias(
    documents: list[Document],
    encoders: dict[str, Encoder],
    places: int,
    size: Callable[[Sequence[str]], Sequence[int]],
    count: int,
    seed: int = 0,
) -> dict:
    """All three of every encoder, over at most `count` groups of comparable documents."""
    groups = sample(sentences_of(documents), count, seed)
    kept = [
        Document(id=id_, lang=lang, sentences=text) for id_, group in groups.items() for lang, text in group.items()
    ]
    return {
        "groups": len(groups),
        "documents": len(kept),
        "systems": {
            name: {
                "position": position_bias(groups, encode, places, size, seed),
                "language": language_bias(kept, encode),
                "length": length_stress(groups, encode),
            }
            for name, encode in encoders.items()
        },
    }
