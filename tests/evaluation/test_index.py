import json

import faiss
import numpy as np
import pytest

from hmde_dist.command import InputError
from hmde_dist.evaluation.encode import open_vectors
from hmde_dist.evaluation.index import build_index, choose_factory, search


@pytest.fixture
def vectors(tmp_path):
    folder = tmp_path / "vectors"
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "vectors.npy", rows)
    facts = [{"id": f"d{i // 2}", "lang": "de" if i % 2 else "en", "title": f"t{i}"} for i in range(600)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"documents": 600, "width": 16}), encoding="utf-8")
    return folder


def test_flat_search_is_exact(vectors, tmp_path):
    manifest = build_index(vectors, None, "cpu", tmp_path / "index")
    assert (manifest["factory"], manifest["recall@10"]) == ("Flat", 1.0)
    rows, facts = open_vectors(vectors)
    query = np.random.default_rng(1).normal(size=(1, 16)).astype(np.float32)
    found = search(tmp_path / "index", query, 5)[0]
    best = np.argsort(-(rows @ query[0]))[:5]
    assert [(hit["id"], hit["lang"]) for hit in found] == [(facts[i]["id"], facts[i]["lang"]) for i in best]
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    assert found[0]["score"] == pytest.approx(float(rows[best[0]] @ query[0] / np.linalg.norm(query)), rel=1e-4)


def test_an_approximate_index_reports_what_it_loses(vectors, tmp_path):
    manifest = build_index(vectors, "IVF8,PQ4x4fs", "cpu", tmp_path / "index")
    assert 0.05 < manifest["recall@10"] < 1.0
    assert manifest["bytes_per_vector"] < 64
    assert faiss.read_index(str(tmp_path / "index" / "index.faiss")).ntotal == 600


@pytest.mark.parametrize(
    ("factory", "device", "message"),
    [("NoSuch", "cpu", "factory"), ("IVF5000,Flat", "cpu", "more than 600 vectors"), (None, "gpu", "sees no GPU")],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(factory, device, message, vectors, tmp_path):
    if device == "gpu" and getattr(faiss, "get_num_gpus", int)():
        device, message, factory = "cpu", "factory", "NoSuch"
    with pytest.raises(InputError, match=message):
        build_index(vectors, factory, device, tmp_path / "index")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vectors"]


def test_vectors_of_another_model_are_refused(vectors, tmp_path):
    build_index(vectors, None, "cpu", tmp_path / "index")
    with pytest.raises(InputError, match="width 16"):
        search(tmp_path / "index", np.ones((1, 8), np.float32), 3)
    with pytest.raises(InputError, match="no index"):
        search(vectors, np.ones((1, 16), np.float32), 3)


def test_large_corpora_get_inverted_lists():
    assert choose_factory(1000) == "Flat"
    assert choose_factory(1_000_000) == "IVF4000,Flat"
