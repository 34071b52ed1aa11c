"""Vectors after encoding: calibrated by language, augmented by side vectors, or truncated; from one folder to another.

A calibration is unsupervised and knows the language of a vector: mean and deviation of each language are taken out (as in
CCP, arXiv 2206.03281), or its vectors are rotated onto those of a pivot language. It is one safetensors file:

    mean/de, deviation/de [W], rotation/de [W, W]     of each language, what was fitted of them
    metadata "facts"                                  steps, pivot, vectors of each language, the model they are of

Memory holds a block of vectors; for a rotation a matrix of each language and `PIVOTS` vectors; for side vectors 16 bytes
of each.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hmde_dist.command import InputError, output_file, output_folder, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.ranking import named
from hmde_dist.evaluation.retrieval import Scorer
from hmde_dist.stream.vectors import FACTS, Facts, VectorFile, Vectors, link

STEPS = ("center", "scale", "rotate")  # in this order
CALIBRATION = "calibration.safetensors"
PIVOTS = 20_000  # documents of the pivot language that a rotation is fitted on, spread over the folder


@dataclass(frozen=True)
class Calibration:
    """What is done to the vectors of each language.

    Attributes:
        tensors: "mean/de", "deviation/de", "rotation/de", ...; all languages have the same kinds.
        facts: `steps`, `pivot`, `model`, `fitted` (vectors of each language; with a rotation, documents shared with the
            pivot) and `left_alone` (the same of languages that have too few).
    """

    tensors: dict[str, np.ndarray]
    facts: dict

    def apply(self, rows: np.ndarray, language: str) -> np.ndarray:
        """Vectors [n, W] of a language, calibrated; as they are if it was not fitted."""
        if (mean := self.tensors.get(f"mean/{language}")) is not None:
            rows = rows - mean
        if (deviation := self.tensors.get(f"deviation/{language}")) is not None:
            rows = rows / deviation
        if (rotation := self.tensors.get(f"rotation/{language}")) is not None:
            rows = rows @ rotation
        return rows

    def save(self, path: Path) -> None:
        with output_file(path, "wb") as file:
            file.write(save(self.tensors, {"facts": json.dumps(self.facts, ensure_ascii=False)}))


def load_calibration(path: Path) -> Calibration:
    """The calibration in a file, or in a folder of a model or of vectors.

    Raises:
        InputError: there is none.
    """
    path = path / CALIBRATION if path.is_dir() else path
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return Calibration(tensors, json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: no calibration of tools/postprocess.py ({error})") from None


@dataclass(frozen=True)
class Folder:
    """A folder of document vectors with their facts.

    Raises:
        InputError: none, or one of sentences.
    """

    vectors: Vectors
    facts: Facts

    @classmethod
    def open(cls, path: Path) -> "Folder":
        vectors = Vectors(path)
        if len(vectors) != vectors.manifest["documents"]:
            raise InputError(f"{path} holds vectors of sentences: only those of documents are processed")
        return cls(vectors, Facts(path, vectors.manifest["languages"]))

    def blocks(self, what: str) -> Iterator[tuple[int, np.ndarray]]:
        """All blocks (first row, rows) under a progress bar."""
        with progress(total=len(self.vectors), desc=what, unit="document", leave=False) as bar:
            for first, rows in self.vectors.blocks(0, len(self.vectors)):
                yield first, rows
                bar.update(len(rows))

    def by_language(self, first: int, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(language, its places in the block)."""
        numbers = self.facts.languages[first : first + len(rows)]
        for number in np.unique(numbers):
            yield self.facts.language_names[number], np.flatnonzero(numbers == number)

    def check_fits(self, other: "Folder") -> None:
        if self.vectors.manifest["model"]["sha256"] != other.vectors.manifest["model"]["sha256"]:
            raise InputError(f"{other.vectors.folder} was encoded by another model than {self.vectors.folder}")
        if self.vectors.width != other.vectors.width:
            raise InputError(f"{other.vectors.folder}: width {other.vectors.width}, not {self.vectors.width}")


# ---- calibration -----------------------------------------------------------------------------------------------------


def fit(folder: Folder, steps: Sequence[str], least: int, pivot: str | None = None) -> Calibration:
    """A calibration of the languages that have at least `least` vectors in `folder`.

    Args:
        steps: of `STEPS`.
        pivot: the language that the others are rotated onto, by documents that share their id (orthogonal Procrustes,
            Schoenemann 1966); None = the one with the most vectors. Then a language needs `least` such documents.

    Raises:
        InputError: no language has enough, or the pivot is none of them.
    """
    counts, means, deviations = _moments(folder)
    fitted = {name: count for name, count in counts.items() if count >= least}
    if not fitted:
        raise InputError(f"{folder.vectors.folder}: no language has {least} vectors; lower --least, or --fit on more")
    tensors: dict[str, np.ndarray] = {}
    if "center" in steps:
        tensors |= {f"mean/{name}": means[name] for name in fitted}
    if "scale" in steps:
        tensors |= {f"deviation/{name}": deviations[name] for name in fitted}
    if "rotate" in steps:
        pivot = pivot or max(fitted, key=fitted.__getitem__)
        if pivot not in fitted:
            raise InputError(f"--pivot {pivot}: {counts.get(pivot, 0)} vectors, {least} needed (--least)")
        shared, rotations = _rotations(folder, Calibration(tensors, {}), pivot, counts[pivot])
        counts |= shared
        fitted = {name: count for name, count in counts.items() if count >= least}
        if len(fitted) < 2:
            raise InputError(f"--pivot {pivot}: no language shares {least} documents with it (--least)")
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition("/")[2] in fitted}
        tensors |= {f"rotation/{name}": rotations[name] for name in fitted if name != pivot}
    return Calibration(
        {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()},
        {
            "steps": [step for step in STEPS if step in steps],
            "pivot": pivot,
            "model": folder.vectors.manifest["model"]["sha256"],
            "fitted": fitted,
            "left_alone": {name: count for name, count in counts.items() if name not in fitted},
        },
    )


def _moments(folder: Folder) -> tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Vectors, mean and standard deviation of each language."""
    counts: dict[str, int] = {}
    totals: dict[str, np.ndarray] = {}  # [2, W]: of the values and of their squares
    for first, rows in folder.blocks("moments"):
        for language, places in folder.by_language(first, rows):
            chosen = rows[places].astype(np.float64)
            counts[language] = counts.get(language, 0) + len(chosen)
            totals[language] = totals.get(language, 0) + np.stack([chosen.sum(axis=0), (chosen**2).sum(axis=0)])
    means = {name: total[0] / counts[name] for name, total in totals.items()}
    variances = {name: total[1] / counts[name] - means[name] ** 2 for name, total in totals.items()}
    # A coordinate that never moves stays where it is.
    deviations = {name: np.sqrt(np.where(v > 1e-12, v, 1.0)) for name, v in variances.items()}
    return counts, means, deviations


def _rotations(folder: Folder, before: Calibration, pivot: str, count: int) -> tuple[dict, dict]:
    """For each language but the pivot: how many documents it shares with the pivot's sample, and its rotation [W, W]."""
    every, seen, sample = -(-count // PIVOTS), 0, []
    wanted = folder.facts.language_names.index(pivot)
    for first, rows in folder.blocks("pivot"):
        places = np.flatnonzero(folder.facts.languages[first : first + len(rows)] == wanted)
        sample += (first + places[-seen % every :: every]).tolist()
        seen += len(places)
    targets = before.apply(folder.vectors.take(np.array(sample)), pivot)
    place_of = {folder.facts[number]["id"]: place for place, number in enumerate(sample)}
    shared: dict[str, int] = {}
    products: dict[str, np.ndarray] = {}
    for first, rows in folder.blocks("rotations"):
        place = np.array([place_of.get(id_, -1) for id_ in folder.facts.ids(first, first + len(rows))])
        for language, places in folder.by_language(first, rows):
            if language == pivot:
                continue
            places = places[place[places] >= 0]
            own = before.apply(rows[places], language).astype(np.float64)
            shared[language] = shared.get(language, 0) + len(places)
            products[language] = products.get(language, 0) + own.T @ targets[place[places]]
    rotations = {}
    for language, product in products.items():
        left, _, right = np.linalg.svd(product)
        rotations[language] = left @ right
    return shared, rotations


def calibrate(source: Folder, calibration: Calibration, out: Path) -> dict[str, int]:
    """Write calibrated vectors, of unit length, and the calibration beside them.

    Returns:
        Vectors of each language that was left alone.

    Raises:
        InputError: the calibration is of another model's vectors.
    """
    if calibration.facts["model"] != source.vectors.manifest["model"]["sha256"]:
        raise InputError(f"the calibration is not of the model that made {source.vectors.folder}")
    left_alone: dict[str, int] = {}

    def change(first: int, rows: np.ndarray) -> np.ndarray:
        changed = rows.copy()
        for language, places in source.by_language(first, rows):
            if language in calibration.facts["fitted"]:
                changed[places] = unit(calibration.apply(rows[places], language))
            else:
                left_alone[language] = left_alone.get(language, 0) + len(places)
        return changed

    with output_folder(out) as folder:
        write(source, folder, change, {"calibrate": calibration.facts["steps"]})
        calibration.save(folder / CALIBRATION)
    return left_alone


# ---- augmentation and truncation -------------------------------------------------------------------------------------


def augment(rows: np.ndarray, sums: np.ndarray, alpha: float) -> np.ndarray:
    """(1 - alpha) e + alpha * sum of the side vectors, not normalised again (xQG, arXiv 2305.03950)."""
    return ((1 - alpha) * rows + alpha * sums).astype(np.float32)


def augment_folder(source: Folder, side: Folder, alpha: float, out: Path) -> int:
    """Write vectors augmented by all side vectors that share the document's id, of any language.

    Returns:
        How many documents have no side vector.

    Raises:
        InputError: the side vectors are another model's.
    """
    source.check_fits(side)
    hashes = np.empty(len(side.vectors), dtype=np.uint64)
    for first, rows in side.blocks("side ids"):
        hashes[first : first + len(rows)] = _hashes(side.facts.ids(first, first + len(rows)))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    without = 0

    def change(first: int, rows: np.ndarray) -> np.ndarray:
        nonlocal without
        wanted = _hashes(source.facts.ids(first, first + len(rows)))
        begin, stop = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        sums = np.zeros_like(rows)
        for place in range(int((stop - begin).max(initial=0))):  # the n-th side vector of every document that has one
            having = np.flatnonzero(begin + place < stop)
            sums[having] += side.vectors.take(order[begin[having] + place])
        without += int((begin == stop).sum())
        return augment(rows, sums, alpha)

    with output_folder(out) as folder:
        write(source, folder, change, {"augment": {"side": side.vectors.folder.name, "alpha": alpha}})
    return without


def _hashes(ids: Sequence[str]) -> np.ndarray:
    digests = (hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def truncate(rows: np.ndarray, width: int) -> np.ndarray:
    """The first `width` coordinates, of unit length (Matryoshka, arXiv 2205.13147)."""
    return unit(rows[:, :width])


def truncate_folder(source: Folder, width: int, out: Path) -> None:
    """Write truncated vectors.

    Raises:
        InputError: they are no wider than that.
    """
    if width >= source.vectors.width:
        raise InputError(f"--truncate {width}: the vectors have width {source.vectors.width}")
    with output_folder(out) as folder:
        write(source, folder, lambda _, rows: truncate(rows, width), {"truncate": width}, width)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def write(
    source: Folder,
    folder: Path,
    change: Callable[[int, np.ndarray], np.ndarray],
    note: dict,
    width: int | None = None,
) -> None:
    """Write `change(first row, rows)` of all vectors of `source` into `folder`, with the facts of the same documents.

    Args:
        note: what was done, for the manifest.
    """
    manifest, shards = source.vectors.manifest, []
    blocks = source.blocks("write")
    for shard in source.vectors.shards:
        path = folder / shard["file"]
        with VectorFile(path, width or source.vectors.width, source.vectors.precision) as file:
            while file.rows < shard["rows"]:  # blocks end where shards do
                file.append(change(*next(blocks)).astype(np.float32))
        shards.append(shard | {"bytes": path.stat().st_size})
    next(blocks, None)  # closes the bar
    for name in FACTS:
        link(source.vectors.folder / name, folder / name)
    manifest = manifest | {
        "width": width or source.vectors.width,
        "shards": shards,
        "processed": [*manifest.get("processed", []), note],
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def vector_systems(
    folders: Sequence[Path], queries: Path | None = None
) -> tuple[list[Document], dict[str, Callable[[list[Document]], Scorer]]]:
    """What `retrieval.evaluate_groups` compares: the documents of the first folder, and a system for each folder.

    Scores are inner products of the vectors as they lie: cosines, unless they were augmented.

    Args:
        queries: vectors of the queries; None = the folder's own.

    Raises:
        InputError: folders of other documents.
    """
    first = Folder.open(folders[0])
    documents = [
        Document(id=fact["id"], lang=fact["lang"], text="")
        for fact in map(first.facts.__getitem__, range(len(first.facts)))
    ]
    given = _rows(queries, documents) if queries else None
    systems = {}
    for name, path in named(folders, ()).items():
        rows = _rows(path, documents)
        asked = rows if given is None else given
        if asked.shape[1] != rows.shape[1]:
            raise InputError(f"{queries}: width {asked.shape[1]}, not {rows.shape[1]} as {path}")
        systems[name] = lambda _, asked=asked, rows=rows: lambda q, c: asked[q] @ rows[c].T
    return documents, systems


def _rows(path: Path, documents: list[Document]) -> np.ndarray:
    """All vectors [N, W] of a folder, which must be of these documents in their order."""
    folder = Folder.open(path)
    ids = folder.facts.ids(0, len(folder.facts))
    languages = [folder.facts.language_names[number] for number in folder.facts.languages]
    if list(zip(ids, languages, strict=True)) != [(document.id, document.lang) for document in documents]:
        raise InputError(f"{path} has vectors of other documents than the first folder: encode the same --documents")
    return folder.vectors.take(np.arange(len(folder.vectors)))
