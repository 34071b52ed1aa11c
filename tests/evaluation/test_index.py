import json
import shutil

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vector_folders import LANGUAGES, PEAK, clustered, python, write_vectors

from hmde_dist.command import InputError
from hmde_dist.corpus.steps import ShareDone
from hmde_dist.evaluation import index as index_module
from hmde_dist.evaluation.index import STEPS, build_index, choose_factory, stratified_sample
from hmde_dist.evaluation.search import DocumentIndex, merge_top

COUNT, WIDTH = 3000, 32


@pytest.fixture(scope="module")
def rows():
    return clustered(COUNT + 50, WIDTH)


@pytest.fixture(scope="module")
def vectors(rows, tmp_path_factory):
    return write_vectors(tmp_path_factory.mktemp("vectors") / "out", rows[:COUNT])


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(index_module, "PART_ROWS", 900)


def nearest(rows, query, k):
    return np.argsort(-(rows @ query), kind="stable")[:k]


def test_flat_search_is_exact(vectors, rows, tmp_path):
    manifest = build_index(vectors, None, "cpu", tmp_path / "index")
    assert (manifest["factory"], manifest["recall@10"], manifest["bytes_per_vector"]) == ("Flat", 1.0, 128.0)
    index, query = DocumentIndex(tmp_path / "index"), 3 * rows[COUNT]
    (found,) = index.results(query[None], 5)
    best = nearest(rows[:COUNT], query, 5)
    assert [hit["id"] for hit in found] == [f"d{row}" for row in best]
    assert [hit["lang"] for hit in found] == [LANGUAGES[2 if row % 10 == 0 else row % 2] for row in best]
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    assert found[0]["score"] == pytest.approx(float(rows[best[0]] @ rows[COUNT]), rel=1e-4)


FACTORIES = [
    "IVF32,Flat",
    "IVF32,PQ8",
    "IVF32,PQ16x4fs",
    "PCAR24,IVF32,PQ12x4fs",
    "PCAR24,IVF32,SQ8",
    "HNSW16",
    "PQ16x4fs",
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_approximate_index_finds_nine_of_ten_with_exact_scores(factory, vectors, rows, tmp_path):
    manifest = build_index(vectors, factory, "cpu", tmp_path / "index")
    index, queries = DocumentIndex(tmp_path / "index"), rows[COUNT:]
    scores, found = index.search(queries, 10)
    exact = [nearest(rows[:COUNT], query, 10) for query in queries]
    recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall >= 0.9 and manifest["recall@10"] >= 0.9
    np.testing.assert_allclose(scores, np.einsum("qw,qkw->qk", queries, rows[found]), atol=1e-5)
    assert (np.diff(scores) <= 0).all()
    assert faiss.read_index(str(tmp_path / "index" / "index.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR).ntotal == COUNT
    # Codes alone, in the lists that were chosen, would not do.
    if "PQ8" in factory:
        index._rerank = 1
        _, coded = index.search(queries, 10)
        assert (
            np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(exact, coded, strict=True)]) < recall
        )


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32,PQ8", "IVF32,PQ16x4fs", "PCAR24,IVF32,PQ12x4fs"])
def test_parts_merged_on_disk_are_the_index_of_the_whole(factory, vectors, rows, tmp_path, monkeypatch):
    build_index(vectors, factory, "cpu", tmp_path / "whole")
    monkeypatch.setattr(index_module, "PART_ROWS", 700)
    build_index(vectors, factory, "cpu", tmp_path / "parts")
    for name in ("index.faiss", "index.ivfdata"):
        assert (tmp_path / "whole" / name).exists() == (tmp_path / "parts" / name).exists()
    # Built by FAISS in one go, without parts.
    trained = tmp_path / "trained.faiss"
    index_module._train(tmp_path, vectors, factory, 4, "cpu")
    plain = faiss.read_index(str(trained))
    plain.add(rows[:COUNT])
    faiss.extract_index_ivf(plain).nprobe = 8
    expected = plain.search(rows[COUNT:], 20)
    for name in ("whole", "parts"):
        index = DocumentIndex(tmp_path / name)
        index.effort, index._rerank = 8, 1
        scores, found = index.search(rows[COUNT:], 20)
        # Codes have equal scores, whose order is free.
        np.testing.assert_allclose(scores, expected[0], rtol=1e-5, atol=1e-6)
        same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, expected[1], strict=True)]
        assert np.mean(same) > 19.5 if "x4fs" in factory else same == [20] * len(same)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 12))
def test_merged_results_are_the_highest_of_all_parts(seed, parts, k):
    random = np.random.default_rng(seed)
    scores = random.integers(-5, 5, size=(3, parts * 6)).astype(np.float32)
    numbers = np.stack([random.permutation(parts * 6) for _ in range(3)])
    found = merge_top([(scores[:, i::parts], numbers[:, i::parts]) for i in range(parts)], k)
    for row in range(3):
        expected = sorted(zip(-scores[row], numbers[row], strict=True))[:k]
        assert list(zip(-found[0][row], found[1][row], strict=True)) == expected


def test_shares_end_with_the_same_bytes(vectors, small_parts, tmp_path):
    arguments = (vectors, "IVF32,PQ8", "cpu")
    build_index(*arguments, tmp_path / "one")
    for step, many in STEPS.items():
        for share in range(2 if many else 1):
            if step == "finish":
                build_index(*arguments, tmp_path / "two", only=step)
                continue
            with pytest.raises(ShareDone):
                build_index(*arguments, tmp_path / "two", only=step, share=(share, 2 if many else 1))
    for name in ("index.faiss", "index.ivfdata", "vectors-00000.npy", "documents.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Builds in parts of 900; with a step and a number in KILL it kills itself with -9 in the middle of that task.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from hmde_dist.evaluation import index
index.PART_ROWS = 900
count, blocks, merge = 0, index.Vectors.blocks, index.merge
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def dying_blocks(self, first, stop):
    global count
    count += 1
    for block in blocks(self, first, stop):
        yield block
        if sys.argv[3] == f"add:{count}":
            die()
index.Vectors.blocks = dying_blocks
index.merge = lambda *arguments: (merge(*arguments), sys.argv[3] == "merge" and die())
index.build_index(Path(sys.argv[1]), "IVF32,PQ8", "cpu", Path(sys.argv[2]))
"""


def test_killed_while_it_builds_it_goes_on_to_the_same_bytes(vectors, small_parts, tmp_path):
    build_index(vectors, "IVF32,PQ8", "cpu", tmp_path / "whole")
    for place, done in (("add:3", 2), ("merge", 4)):
        killed = python(PROGRAM, vectors, tmp_path / "out", place, folder=tmp_path)
        assert killed.code == -9 and not (tmp_path / "out").exists(), killed.output
        assert len(list((tmp_path / "out.partial" / "add").glob("[0-9]*/part.faiss"))) == done
    job = python(PROGRAM, vectors, tmp_path / "out", "never", folder=tmp_path)
    assert job.code == 0, job.output
    assert "step train: 1 task, 1 done before" in job.output and "step add: 4 tasks, 4 done before" in job.output
    for name in ("index.faiss", "index.ivfdata", "vectors-00000.npy", "documents.jsonl", "offsets.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("factory", ["IVF32,PQ8", "IVF32,PQ16x4fs", "PCAR24,IVF32,Flat"])
def test_distances_to_centroids_may_be_computed_elsewhere(factory, vectors, rows, small_parts, tmp_path, monkeypatch):
    """With --device gpu they are; here another index on the CPU stands in for those on the GPUs."""
    build_index(vectors, factory, "cpu", tmp_path / "cpu")
    used = []

    def elsewhere(index):
        used.append(index.ntotal)
        return faiss.clone_index(index)

    monkeypatch.setattr(index_module, "_to_gpus", elsewhere)
    monkeypatch.setattr(index_module, "_check_gpu", lambda: None)
    build_index(vectors, factory, "gpu", tmp_path / "gpu")
    assert used == [0, 32, 32, 32, 32]
    for one, other in zip(
        *(DocumentIndex(tmp_path / name).search(rows[COUNT:], 10) for name in ("cpu", "gpu")), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_search_can_be_kept_to_languages(vectors, rows, tmp_path):
    for factory in ("Flat", "IVF32,PQ16x4fs", "PCAR24,IVF32,PQ12x4fs", "HNSW32"):
        build_index(vectors, factory, "cpu", tmp_path / "index")
        index = DocumentIndex(tmp_path / "index")
        index.effort = max(index.efforts())
        for chosen in (["sw"], ["de", "sw"]):
            (found,) = index.results(rows[COUNT][None], 8, chosen)
            fitting = [n for n in range(COUNT) if LANGUAGES[2 if n % 10 == 0 else n % 2] in chosen]
            best = [f"d{fitting[n]}" for n in nearest(rows[fitting], rows[COUNT], 8)]
            assert {hit["lang"] for hit in found} <= set(chosen)
            assert len(set(best) & {hit["id"] for hit in found}) >= 7
        with pytest.raises(InputError, match='no document is in "xx"; there are: de, en, sw'):
            index.results(rows[COUNT][None], 8, ["xx"])
        shutil.rmtree(tmp_path / "index")
    build_index(vectors, "PQ16x4fs", "cpu", tmp_path / "index")
    with pytest.raises(InputError, match="kind PQ16x4fs cannot search in chosen languages"):
        DocumentIndex(tmp_path / "index").results(rows[COUNT][None], 8, ["sw"])


def test_a_sample_has_every_language():
    random = np.random.default_rng(0)
    languages = np.repeat([0, 1, 3], [9000, 900, 12])
    found = stratified_sample(languages, 1000, random)
    assert len(found) == len(set(found.tolist())) == 1000 and (np.diff(found) > 0).all()
    counts = np.bincount(languages[found])
    assert counts[3] == 12 and counts[1] == 1000 // 2 * (900 / 9912 + 1 / 3) // 1 and counts[:3].sum() == 988
    first = found[languages[found] == 0]
    assert 3500 < first.mean() < 5500  # not the first of them
    assert len(stratified_sample(languages, 10**6, random)) == 9912


MEMORY = (
    PEAK
    + """
import sys
import numpy as np
from pathlib import Path
from hmde_dist.evaluation import index, search
from hmde_dist.stream import vectors
index.SAMPLE, index.PART_ROWS, index.QUERIES, vectors.BLOCK_BYTES = 4096, 10_000, 10, 1 << 20
index.build_index(Path(sys.argv[1]), "IVF32,PQ128x4fs", "cpu", Path(sys.argv[2]))
print("built", peak_mib())
found = search.DocumentIndex(sys.argv[2])
found.results(np.ones((5, 512), np.float32), 10)
print("peak", peak_mib())
"""
)


def test_memory_does_not_grow_with_the_vectors(tmp_path):
    peaks = []
    for count in (10_000, 50_000):
        folder = write_vectors(tmp_path / f"vectors-{count}", clustered(count, 512), shard_rows=8192)
        job = python(MEMORY, folder, tmp_path / f"index-{count}", folder=tmp_path)
        assert job.code == 0, job.output
        peaks.append(float(job.output.split()[-1]))
    # The 40,000 more vectors have 78 MiB, their codes 3 MiB. Pages of a map that are touched count, with their neighbours
    # in the page cache: once all of the file, but no copy of it.
    assert peaks[1] - peaks[0] < 120, peaks


@pytest.mark.parametrize(
    ("factory", "device", "message"),
    [
        ("NoSuch", "cpu", "not a FAISS factory string"),
        ("IVF5000,Flat", "cpu", "more than 3000 vectors"),
        ("IVF32,PQ8,RFlat", "cpu", "leave refinement"),
        (None, "gpu", "sees no GPU"),
    ],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(factory, device, message, vectors, tmp_path):
    if device == "gpu" and getattr(faiss, "get_num_gpus", int)():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message):
        build_index(vectors, factory, device, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_vectors_that_are_not_of_documents_or_of_another_model_are_refused(vectors, rows, tmp_path):
    build_index(vectors, None, "cpu", tmp_path / "index")
    with pytest.raises(InputError, match="width 32"):
        DocumentIndex(tmp_path / "index").search(np.ones((1, 8), np.float32), 3)
    with pytest.raises(InputError, match="no index"):
        DocumentIndex(vectors)
    sentences = write_vectors(tmp_path / "sentences", rows[:100])
    manifest = json.loads((sentences / "manifest.json").read_text()) | {"documents": 40}
    (sentences / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="vectors of sentences"):
        build_index(sentences, None, "cpu", tmp_path / "none")


def test_the_kind_of_index_follows_number_and_memory():
    assert choose_factory(1000, 768, 4) == "Flat"
    assert choose_factory(100_000, 768, 0.25) == "IVF256,PQ192x4fs"
    assert choose_factory(500_000, 768, 4) == "IVF512,Flat"
    assert choose_factory(1_000_000, 768, 4) == "IVF1024,PQ192x4fs"
    assert choose_factory(1_000_000, 768, 16) == "IVF1024,Flat"
    assert choose_factory(100_000_000, 768, 16) == "IVF8192,PQ96x4fs"
    with pytest.raises(InputError, match="--memory-gib 1 is too little for 100000000 vectors"):
        choose_factory(100_000_000, 768, 1)
