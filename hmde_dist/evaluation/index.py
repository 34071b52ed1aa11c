"""FAISS indexes over document vectors: build, search, and what the index loses against exact search.

OUT/
  index.faiss        as faiss.write_index writes it, the same from CPU and GPU
  documents.jsonl    id, lang and title by position
  manifest.json      factory string, recall@10 against exact search, sizes
"""

import json
import shutil
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, output_folder, progress
from hmde_dist.evaluation.encode import open_vectors

BLOCK = 1 << 16
RECALL_QUERIES = 200


def choose_factory(count: int) -> str:
    """Exact search while that is fast, else inverted lists (about 4 * sqrt(N) of them)."""
    return "Flat" if count <= 200_000 else f"IVF{int(4 * count**0.5)},Flat"


def build_index(vectors_folder: str | Path, factory: str | None, device: str, out: str | Path, seed: int = 0) -> dict:
    """Build an inner-product index of the vectors under `vectors_folder`; returns the manifest.

    Args:
        factory: a FAISS factory string; None chooses by size.
        device: "cpu" or "gpu".
    """
    import faiss

    vectors, facts = open_vectors(vectors_folder)
    factory = factory or choose_factory(len(vectors))
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise InputError(f'--factory "{factory}": not a FAISS factory string for width {vectors.shape[1]}') from None
    if device == "gpu":
        if not getattr(faiss, "get_num_gpus", int)():
            raise InputError(
                "--device gpu: this FAISS sees no GPU; install the extra hmde-dist[gpu] or use --device cpu"
            )
        index = faiss.index_cpu_to_all_gpus(index)
    random = np.random.default_rng(seed)
    if not index.is_trained:
        # A random sample: the first n rows would be one language of a sorted corpus.
        sample = np.sort(random.choice(len(vectors), size=min(len(vectors), 1 << 18), replace=False))
        try:
            index.train(np.ascontiguousarray(vectors[sample]))
        except RuntimeError:
            raise InputError(f'--factory "{factory}" needs more than {len(vectors)} vectors to train') from None
    for first in progress(range(0, len(vectors), BLOCK), desc="add", unit="block"):
        index.add(np.ascontiguousarray(vectors[first : first + BLOCK]))
    if device == "gpu":
        index = faiss.index_gpu_to_cpu(index)
    inverted_lists = faiss.try_extract_index_ivf(index)  # also behind a transform such as OPQ
    if inverted_lists:
        inverted_lists.nprobe = 16
    with output_folder(out) as folder:
        faiss.write_index(index, str(folder / "index.faiss"))
        shutil.copy(Path(vectors_folder) / "documents.jsonl", folder / "documents.jsonl")
        size = (folder / "index.faiss").stat().st_size
        manifest = {
            "factory": factory,
            "documents": len(facts),
            "width": int(vectors.shape[1]),
            "recall@10": recall(index, vectors, random),
            "bytes_per_vector": round(size / len(facts), 1),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def recall(index, vectors: np.ndarray, random: np.random.Generator) -> float:
    """Share of the exact 10 nearest neighbours that `index` finds, over a random sample of its own vectors."""
    import faiss

    sample = np.sort(random.choice(len(vectors), size=min(len(vectors), RECALL_QUERIES), replace=False))
    queries = np.ascontiguousarray(vectors[sample])
    wanted = min(10, len(vectors))
    exact, _ = faiss.knn(queries, np.ascontiguousarray(vectors), wanted, metric=faiss.METRIC_INNER_PRODUCT)[::-1]
    _, found = index.search(queries, wanted)
    return float(np.mean([len(set(a) & set(b)) / wanted for a, b in zip(exact, found, strict=True)]))


def search(index_folder: str | Path, queries: np.ndarray, k: int) -> list[list[dict]]:
    """The `k` nearest documents of each query vector [Q, W]: rank, score, id, lang, title."""
    import faiss

    folder = Path(index_folder)
    if not (folder / "index.faiss").is_file():
        raise InputError(f"{folder}: no index (index.faiss is missing); make one with tools/build_index.py")
    index = faiss.read_index(str(folder / "index.faiss"))
    if index.d != queries.shape[1]:
        raise InputError(
            f"the index holds vectors of width {index.d}, the model makes {queries.shape[1]}: not its index"
        )
    facts = [json.loads(line) for line in open(folder / "documents.jsonl", encoding="utf-8")]
    unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    scores, rows = index.search(unit.astype(np.float32), min(k, len(facts)))
    return [
        [
            {"rank": rank, "score": float(score), **facts[row]}
            for rank, (score, row) in enumerate(zip(score_row, row_row, strict=True), start=1)
            if row >= 0
        ]
        for score_row, row_row in zip(scores, rows, strict=True)
    ]
