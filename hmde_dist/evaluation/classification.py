"""Cross-lingual document classification: a head is trained on one language and tested on all.

The head is linear on frozen vectors (here), or the whole model is trained with it (`evaluation.fine_tuning`). Intervals
are 95 % bootstrap intervals over the documents that are tested, versions of one document drawn together; what another
training would change shows in the spread over seeds.
"""

import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.labelled import Labelled, Rows
from hmde_dist.evaluation.significance import interval, multiplicities

RESAMPLES = 1000

# Trains on rows and predicts the test rows: (rows, targets [N, L], seed) -> [tested, L], all bool. A document of a task
# with one label has one True a row.
Fit = Callable[[Rows, np.ndarray, int], np.ndarray]


def linear_head(documents: list[Document], encode: Callable[[list[Document]], np.ndarray], many: bool) -> Fit:
    """Logistic regression (L2, C = 1) on frozen vectors of unit length, standardised on the training documents; one of
    its own for each label where a document has many. Its optimum is unique, so the seed does not change it."""
    features = encode(documents)
    if not sparse.issparse(features):
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def fit(rows: Rows, targets: np.ndarray, seed: int) -> np.ndarray:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        head = LogisticRegression(max_iter=2000)
        scaler = [] if sparse.issparse(features) else [StandardScaler()]
        wanted = targets[rows.train]
        predicted = np.zeros((len(rows.test), targets.shape[1]), dtype=bool)
        if many:
            # A label that no training document has, or every one, has no head: it is never or always predicted.
            learned = np.flatnonzero(wanted.any(axis=0) & ~wanted.all(axis=0))
            predicted[:, wanted.all(axis=0)] = True
            machine = make_pipeline(*scaler, OneVsRestClassifier(head))
            machine.fit(features[rows.train], wanted[:, learned].astype(int))
            predicted[:, learned] = machine.predict(features[rows.test]).reshape(len(rows.test), -1) > 0
        else:
            machine = make_pipeline(*scaler, head).fit(features[rows.train], wanted.argmax(axis=1))
            predicted[np.arange(len(rows.test)), machine.predict(features[rows.test])] = True
        return predicted

    return fit


def classify(
    data: Labelled,
    language: str,
    systems: dict[str, Callable[[], Fit]],
    seeds: Sequence[int],
    seen: Sequence[str] | None = None,
) -> dict:
    """Accuracy and F1 of every system in every language, with a head trained on the documents of one.

    Args:
        seen: languages that the encoder was trained on; None = not known.
        systems: what makes a `Fit`, by name; made only when it is its turn.
        seeds: of splits (where the data have none of their own) and of training.

    Raises:
        InputError: nothing to train or test on, or only one label to learn.
    """
    names = sorted({label for labels in data.labels for label in labels})
    place = {name: number for number, name in enumerate(names)}
    targets = np.zeros((len(data.documents), len(names)), dtype=bool)
    for row, labels in enumerate(data.labels):
        targets[row, [place[label] for label in labels]] = True
    splits = {seed: data.split(language, seed) for seed in seeds}
    for rows in splits.values():
        if len(np.unique(targets[rows.train], axis=0)) < 2:
            raise InputError(f'the {len(rows.train)} training documents in "{language}" all have the same label')
    report = {
        "train_language": language,
        "labels": len(names),
        "many_labels": data.many,
        "seeds": list(seeds),
        "train_documents": [len(rows.train) for rows in splits.values()],
        "test_documents_with_an_unseen_label": float(
            np.mean([(targets[r.test] & ~targets[r.train].any(axis=0)).any(axis=1).mean() for r in splits.values()])
        ),
        "left_out": dict(data.left_out),
        "systems": {},
    }
    for name, make in systems.items():
        began = time.perf_counter()
        fit = make()
        predictions = {seed: fit(rows, targets, seed) for seed, rows in splits.items()}
        report["systems"][name] = summary(data.documents, targets, splits, predictions, language, seen)
        report["systems"][name]["seconds"] = round(time.perf_counter() - began, 2)
    return report


def measures(targets: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of predictions under each row of weights [B, N] of the documents: [B] each.

    Accuracy is the share of documents with exactly the right labels; macro-F1 the mean over labels that occur or are
    predicted (under these weights); micro-F1 counts labels of all documents together, and is the accuracy where every
    document has one. NaN where all weights are zero.
    """
    right = sparse.csr_matrix(targets & predicted, dtype=np.float64)
    positive, guessed = (sparse.csr_matrix(m, dtype=np.float64) for m in (targets, predicted))
    hit, either = weights @ right, weights @ positive + weights @ guessed
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over no label
        return {
            "accuracy": weights @ (targets == predicted).all(axis=1) / weights.sum(axis=1),
            "macro_f1": np.nanmean(np.where(either > 0, 2 * hit / either, np.nan), axis=1),
            "micro_f1": 2 * hit.sum(axis=1) / either.sum(axis=1),
        }


def summary(
    documents: list[Document],
    targets: np.ndarray,
    splits: dict[int, Rows],
    predictions: dict[int, np.ndarray],
    language: str,
    seen: Sequence[str] | None,
) -> dict:
    """Metrics by language, and their mean over languages but that of training: over all, seen and unseen ones."""
    ids = {id_: number for number, id_ in enumerate(dict.fromkeys(document.id for document in documents))}
    unit_of = np.array([ids[document.id] for document in documents])
    languages = np.array([document.lang for document in documents])
    tested = np.unique(np.concatenate([rows.test for rows in splits.values()]))
    units = np.unique(unit_of[tested])
    # The first row weighs every document once: the value itself. All seeds and languages share the draws.
    weights = np.zeros((1 + RESAMPLES, len(ids)))
    weights[0, units] = 1
    weights[1:, units] = multiplicities(len(units), seed=0, resamples=RESAMPLES)
    found: dict[str, dict[str, np.ndarray]] = {}  # language -> measure -> [seeds, 1 + RESAMPLES]
    result = {}
    for lang in sorted(set(languages[tested])):
        by_seed, counts = [], []
        for seed, rows in splits.items():
            inside = languages[rows.test] == lang
            chosen = rows.test[inside]
            by_seed.append(measures(targets[chosen], predictions[seed][inside], weights[:, unit_of[chosen]]))
            counts.append(len(chosen))
        found[lang] = {measure: np.stack([one[measure] for one in by_seed]) for measure in by_seed[0]}
        kind = "unknown" if seen is None else "seen" if lang in seen else "unseen"
        result[lang] = described(found[lang]) | {
            "documents": float(np.mean(counts)),
            "kind": "training" if lang == language else kind,
        }
    groups = {"all other languages": [lang for lang in found if lang != language]}
    for kind in ("seen", "unseen"):
        groups[kind] = [lang for lang in found if result[lang]["kind"] == kind]
    macro = {name: mean_over(found, group) | {"languages": group} for name, group in groups.items() if group}
    return {"macro": macro, "languages": result}


def described(values: dict[str, np.ndarray]) -> dict:
    """Mean over seeds, interval and spread over seeds of values [seeds, 1 + resamples]."""
    summary = {}
    for measure, value in values.items():
        resampled = value[:, 1:].mean(axis=0)
        summary[measure] = float(value[:, 0].mean())
        summary[f"{measure}_interval"] = interval(resampled[np.isfinite(resampled)])
        if len(value) > 1:
            summary[f"{measure}_deviation"] = float(value[:, 0].std(ddof=1))
    return summary


def mean_over(found: dict[str, dict[str, np.ndarray]], languages: list[str]) -> dict:
    """The unweighted mean over languages, described as a language is."""
    first = found[languages[0]]
    return described({measure: np.mean([found[lang][measure] for lang in languages], axis=0) for measure in first})
