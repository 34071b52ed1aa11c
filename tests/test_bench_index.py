"""The bench of indexes: its vectors are like those of an encoder, and its numbers are those of a real search."""

import sys

import numpy as np
from launch import ROOT

from hmde_dist.evaluation.index import build_index
from hmde_dist.stream.vectors import Facts, Vectors

sys.path.insert(0, str(ROOT / "tools"))
import bench_index


def test_made_up_vectors_lie_as_those_of_documents_do(tmp_path):
    bench_index.generate(2000, 48, 12, 40, tmp_path / "vectors")
    vectors = Vectors(tmp_path / "vectors")
    facts = Facts(tmp_path / "vectors", vectors.manifest["languages"])
    assert len(vectors) == len(facts) == 2000
    assert facts[5] == {"id": "made:1", "lang": "en", "title": "Document 5"}
    rows = vectors.take(np.arange(2000))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    versions, others = np.sum(rows[::4] * rows[1::4], axis=1), rows[::4] @ rows[1::4].T
    assert versions.mean() > 0.8 > 0.6 > others.mean() > 0.1
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert values[:12].sum() / values.sum() > 0.85  # nearly all of it in few dimensions

    queries = np.load(tmp_path / "vectors" / "queries.npy")
    exact = bench_index.exact_search(vectors, queries, 10)
    np.testing.assert_array_equal(exact[0], np.argsort(-(rows @ queries[0]), kind="stable")[:10])
    build_index(tmp_path / "vectors", "IVF16,PQ12x4fs", "cpu", tmp_path / "index")
    measured = bench_index.search(tmp_path / "vectors", tmp_path / "index")
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), measured["found"], strict=True)]
    assert np.mean(shares) > 0.9 and measured["batch"] > 0 and measured["peak_mib"] > 100
