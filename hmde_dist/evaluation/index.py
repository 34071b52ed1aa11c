"""FAISS indexes over folders of document vectors: what kind, build, and how many neighbours an index misses.

The steps of a build (`corpus.steps` makes each of them resumable and spreads it over jobs):

    train     centroids and codes from a sample of all languages; the queries that recall is measured with
    add       each part of the vectors -> an index of its own, and the exact neighbours of the queries in it
    finish    parts merged (inverted lists on disk), the search effort that reaches the recall, manifest

    OUT/
      index.faiss        as `faiss.write_index` writes it, the same with and without a GPU
      index.ivfdata      its inverted lists, where they can be searched from disk
      vectors-*.npy, documents.jsonl, ...   those of the vectors' folder: exact scores, and the facts of the documents
      manifest.json      factory string, recall, effort, sizes, times; written last

A GPU does what takes the time, distances to centroids, in training and in adding; all else is the CPU's work, so every
kind of inverted-list index can be built with one, and the memory of the GPU holds the centroids only.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.steps import Build, file_facts
from hmde_dist.evaluation.search import NEIGHBOURS, DocumentIndex, chatter_to_stderr, is_exact, merge_top, read_index
from hmde_dist.stream.vectors import FACTS, Vectors, link

STEPS = {"train": False, "add": True, "finish": False}
SAMPLE_PER_LIST = 64  # vectors that a centroid is trained from
SAMPLE = 1 << 16  # at least, for codes and rotations
PART_ROWS = 1 << 20
QUERIES = 200  # vectors that recall is measured with
RECALL = 0.95  # that the search effort is chosen for
RERANK = 16  # candidates, for each result, whose exact scores are computed
SMALL = 100_000  # documents that exact search is fast for
CODES_OF_MEMORY = 0.5  # share of the memory that an index may take


def choose_factory(count: int, width: int, memory_gib: float) -> str:
    """A FAISS factory string for `count` vectors: exact for few, else about sqrt(N) inverted lists, with codes of four
    bits where the vectors themselves do not fit into half of the memory.

    Raises:
        InputError: not even the shortest codes fit.
    """
    room = CODES_OF_MEMORY * memory_gib * 2**30
    if count <= SMALL and 4 * width * count <= room:
        return "Flat"
    lists = 2 ** max(4, round(math.log2(count) / 2))
    if (4 * width + 8) * count <= room:
        return f"IVF{lists},Flat"
    for divisor in (4, 8, 16, 32):
        codes = width // divisor
        if width % divisor == 0 and codes >= 2 and (codes / 2 + 8) * count <= room:
            return f"IVF{lists},PQ{codes}x4fs"
    raise InputError(f"--memory-gib {memory_gib:g} is too little for {count} vectors of width {width}")


def new_index(factory: str, width: int):
    """The empty FAISS index of a factory string, for inner products.

    Raises:
        InputError: no such string, or one with a part that a build of parts on disk leaves no place for.
    """
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise InputError(f'--factory "{factory}": not a FAISS factory string for width {width}') from None
    if isinstance(index, (faiss.IndexRefine, faiss.IndexIDMap, faiss.IndexIVFPQR)):
        raise InputError(
            f'--factory "{factory}": leave refinement and id maps out (candidates are ranked again by their exact '
            "scores anyway)"
        )
    coded = faiss.try_extract_index_ivf(index) or index
    coded = faiss.downcast_index(getattr(coded, "storage", coded))  # a graph stores its codes in another index
    if isinstance(coded, (faiss.IndexIVFPQ, faiss.IndexPQ)):
        # For a kind of search that is not used here, it takes a thousand times as long as the rest of the training.
        coded.do_polysemous_training = False
    return index


def build_index(
    vectors_folder: str | Path,
    factory: str | None,
    device: str,
    out: str | Path,
    memory_gib: float = 4,
    only: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict:
    """Build an inner-product index of the vectors under `vectors_folder`; returns its manifest.

    A build that was stopped goes on where it stood: trained, and with the parts that are whole.

    Args:
        factory: a FAISS factory string; None chooses by number and memory.
        device: "cpu" or "gpu".
        memory_gib: for the index when it is searched, and for each step of the build.
        only, share: see `corpus.steps.Build`.

    Raises:
        InputError: bad vectors, factory string or device.
        ShareDone: the share of step `only` is done.
    """
    vectors_folder, out = Path(vectors_folder), Path(out)
    vectors = Vectors(vectors_folder)
    if "documents" not in vectors.manifest or len(vectors) != vectors.manifest["documents"]:
        raise InputError(f"{vectors_folder} holds vectors of sentences: an index needs one vector of each document")
    if any("calibrate" in note for note in vectors.manifest.get("processed", [])):
        raise InputError(
            f"{vectors_folder} holds calibrated vectors, but queries are not: an index would compare unlike things"
        )
    factory = factory or choose_factory(len(vectors), vectors.width, memory_gib)
    index = new_index(factory, vectors.width)
    if device == "gpu":
        _check_gpu()
    settings = {
        "vectors": file_facts([vectors_folder / "manifest.json"]),
        "factory": factory,
        "memory_gib": memory_gib,
        "device": device,
        "part_rows": PART_ROWS,
    }
    parts = list(_parts(index, len(vectors), memory_gib))
    with Build(out, settings, 1, only, share) as build:
        if build.complete:
            return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        trained = build.folder("train", 0)
        (train_seconds,) = build.run("train", _train, [(vectors_folder, factory, memory_gib, device)])
        add_seconds = build.run("add", _add, [(vectors_folder, trained, *part, device) for part in parts])
        folders = [build.folder("add", number) for number in range(len(parts))]
        manifest = {"factory": factory, "train_seconds": train_seconds, "add_seconds": round(sum(add_seconds), 1)}
        build.finish(_finish, (vectors_folder, trained, folders, manifest))
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def _check_gpu() -> None:
    import faiss

    if not getattr(faiss, "get_num_gpus", int)():
        raise InputError("--device gpu: this FAISS sees no GPU; install the extra hmde-dist[gpu] or use --device cpu")


def _parts(index, count: int, memory_gib: float) -> Iterator[tuple[int, int]]:
    """(first, stop) rows of each part. What has no inverted lists cannot be merged: it is one part."""
    import faiss

    inverted = faiss.try_extract_index_ivf(index)
    rows = count
    if inverted:
        rows = int(min(PART_ROWS, max(1, memory_gib * 2**30 / 4 / (inverted.code_size + 8))))
    for first in range(0, count, rows):
        yield first, min(first + rows, count)


def stratified_sample(languages: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Sorted numbers of `size` documents: half in proportion to their languages, half alike for every language.

    The first n rows would be one language of a sorted corpus, and a plain sample hardly any of a rare one, for which
    there would be no centroids.

    Args:
        languages: [N] number of each document's language.
    """
    counts = np.bincount(languages)
    size = min(size, len(languages))
    wanted = np.floor(size / 2 * (counts / len(languages) + (counts > 0) / (counts > 0).sum())).astype(np.int64)
    taken = np.minimum(counts, wanted)
    for language in np.argsort(-counts, kind="stable"):  # what small languages cannot give
        taken[language] += min(counts[language] - taken[language], size - taken.sum())
    chosen = [
        random.choice(np.flatnonzero(languages == language), size=taken[language], replace=False)
        for language in np.flatnonzero(taken)
    ]
    return np.sort(np.concatenate(chosen))


def _to_gpus(index):
    import faiss

    return faiss.index_cpu_to_all_gpus(index)


def _train(folder: Path, vectors_folder: Path, factory: str, memory_gib: float, device: str) -> float:
    """Step: the trained, empty index, and the numbers of the queries. Returns seconds."""
    import faiss

    began = time.monotonic()
    vectors = Vectors(vectors_folder)
    languages = np.load(vectors_folder / "languages.npy", mmap_mode="r")
    random = np.random.default_rng(0)
    np.save(folder / "queries.npy", stratified_sample(languages, QUERIES, random))
    index = new_index(factory, vectors.width)
    inverted = faiss.try_extract_index_ivf(index)
    if not index.is_trained:
        wanted = max(SAMPLE, SAMPLE_PER_LIST * inverted.nlist if inverted else 0)
        room = int(memory_gib * 2**30 / 4 / (4 * vectors.width))
        sample = vectors.take(stratified_sample(languages, min(wanted, room), random))
        if inverted and len(sample) < inverted.nlist:
            raise InputError(f'--factory "{factory}" needs more than {len(sample)} vectors to train')
        if inverted and device == "gpu":
            inverted.clustering_index = centroids = _to_gpus(faiss.IndexFlatIP(inverted.d))  # noqa: F841 -- kept alive
        try:
            index.train(sample)
        except RuntimeError as error:
            reason = str(error).rpartition("failed: ")[2] or str(error)
            raise InputError(f'--factory "{factory}" cannot be trained from {len(sample)} vectors: {reason}') from None
    faiss.write_index(index, str(folder / "trained.faiss"))
    return round(time.monotonic() - began, 1)


def _add(folder: Path, vectors_folder: Path, trained: Path, first: int, stop: int, device: str) -> float:
    """Step: the index of the rows `first` to `stop`, and the exact neighbours of the queries there. Returns seconds."""
    import faiss
    from faiss.contrib.ivf_tools import replace_ivf_quantizer

    began = time.monotonic()
    vectors = Vectors(vectors_folder)
    queries = np.load(trained / "queries.npy")
    queries = vectors.take(queries)
    index = faiss.read_index(str(trained / "trained.faiss"))
    inverted = faiss.try_extract_index_ivf(index)
    if inverted and device == "gpu":
        centroids = faiss.IndexFlatIP(inverted.d)
        centroids.add(inverted.quantizer.reconstruct_n(0, inverted.nlist))
        on_cpu = replace_ivf_quantizer(inverted, _to_gpus(centroids))
    best = None
    with progress(total=stop - first, desc="add", unit="vector", leave=False) as bar:
        for start, rows in vectors.blocks(first, stop):
            numbers = np.arange(start, start + len(rows))
            if inverted:
                index.add_with_ids(rows, numbers)
            else:
                index.add(rows)
            scores, found = faiss.knn(queries, rows, min(NEIGHBOURS + 1, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            exact = (scores, numbers[found])
            best = merge_top([best, exact], NEIGHBOURS + 1) if best else exact
            bar.update(len(rows))
    if inverted and device == "gpu":
        replace_ivf_quantizer(inverted, on_cpu)
    faiss.write_index(index, str(folder / "part.faiss"))
    np.save(folder / "scores.npy", best[0])
    np.save(folder / "numbers.npy", best[1])
    return round(time.monotonic() - began, 1)


def merge(trained: Path, parts: Sequence[Path], folder: Path) -> None:
    """Join the index files `parts` in `folder/index.faiss`; inverted lists go from file to file, not through memory.

    (Lists of 4-bit codes, which FAISS keeps in blocks for its fast scan, are joined in memory and mapped for search.)
    """
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    index = faiss.read_index(str(trained))
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None:
        (part,) = parts
        link(part, folder / "index.faiss")
        return
    if isinstance(faiss.downcast_InvertedLists(inverted.invlists), faiss.ArrayInvertedLists):
        with chatter_to_stderr():
            merge_ondisk(index, list(map(str, parts)), str(folder / "index.ivfdata"))
        # Without its folder: the index may move.
        faiss.downcast_InvertedLists(inverted.invlists).filename = "index.ivfdata"
    else:
        for path in parts:
            part = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            inverted.merge_from(faiss.extract_index_ivf(part), 0)
        index.ntotal = inverted.ntotal
    faiss.write_index(index, str(folder / "index.faiss"))


def _finish(folder: Path, vectors_folder: Path, trained: Path, parts: Sequence[Path], manifest: dict) -> None:
    """Step: the index as a whole."""
    began = time.monotonic()
    merge(trained / "trained.faiss", [part / "part.faiss" for part in parts], folder)
    vectors = Vectors(vectors_folder)
    for name in (*FACTS, *(shard["file"] for shard in vectors.manifest["shards"])):
        link(vectors_folder / name, folder / name)
    size = sum(path.stat().st_size for path in folder.glob("index.*"))
    manifest |= {
        **vectors.manifest,
        "effort": 1,
        "rerank": 1 if is_exact(read_index(folder)) else RERANK,
        "bytes_per_vector": round(size / len(vectors), 1),
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    queries = np.load(trained / "queries.npy")
    exact = [(np.load(part / "scores.npy"), np.load(part / "numbers.npy")) for part in parts]
    manifest["effort"], recall = _choose_effort(DocumentIndex(folder), queries, merge_top(exact, NEIGHBOURS + 1)[1])
    manifest |= {f"recall@{NEIGHBOURS}": recall, "finish_seconds": round(time.monotonic() - began, 1)}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _choose_effort(index: DocumentIndex, queries: np.ndarray, exact: np.ndarray) -> tuple[int, float]:
    """The least search effort (1, 2, 4 ...) that reaches `RECALL`, or that more effort does not improve on; its recall.

    Recall is the mean share of the exact nearest neighbours of a document, itself not counted, that a search finds.

    Args:
        queries: [Q] numbers of the documents.
        exact: [Q, NEIGHBOURS + 1] their exact nearest, with or (among equal vectors) without themselves.
    """
    rows = index.vectors.take(queries)
    chosen, best = 1, -1.0
    for effort in index.efforts():
        index.effort = effort
        _, found = index.search(rows, NEIGHBOURS + 1)
        shares = []
        for query, right, hits in zip(queries.tolist(), exact.tolist(), found.tolist(), strict=True):
            right = [number for number in right if number not in (query, -1)][:NEIGHBOURS]
            hits = [number for number in hits if number != query][:NEIGHBOURS]
            shares.append(len(set(right) & set(hits)) / max(1, len(right)))
        recall = float(np.mean(shares))
        if recall > best:
            chosen, best = effort, recall
        if recall >= RECALL:
            break
    return chosen, round(best, 4)
