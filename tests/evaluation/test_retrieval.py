import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.evaluation.retrieval import Candidates, cosine_scorer, language_pairs, macro, metrics_of_ranks, retrieval


def by_hand(ids, languages, vectors, source, target):
    ranks = []
    for i, (id_, language) in enumerate(zip(ids, languages, strict=True)):
        pool = [j for j in range(len(ids)) if languages[j] == target]
        right = [j for j in pool if ids[j] == id_]
        if language != source or not right:
            continue
        cosine = {j: vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]) for j in pool}
        ranks.append(1 + sum(cosine[j] > cosine[right[0]] for j in pool))
    return ranks


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_metrics_equal_a_ranking_by_hand(seed):
    random = np.random.default_rng(seed)
    documents = [(str(i), language) for i in range(30) for language in ("de", "en", "ja") if random.random() < 0.7]
    order = random.permutation(len(documents))
    ids, languages = zip(*[documents[i] for i in order], strict=True)
    vectors = random.normal(size=(len(ids), 6))
    candidates = Candidates(list(ids), list(languages))
    results = retrieval(candidates, cosine_scorer(vectors), language_pairs(candidates))
    for pair, found in results.items():
        ranks = by_hand(ids, languages, vectors, *pair.split("-"))
        assert found["queries"] == len(ranks)
        assert found["R@1"] == pytest.approx(np.mean([r == 1 for r in ranks]))
        assert found["R@10"] == pytest.approx(np.mean([r <= 10 for r in ranks]))
        assert found["MRR@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
        assert found["nDCG@10"] == pytest.approx(np.mean([1 / math.log2(r + 1) if r <= 10 else 0 for r in ranks]))


def test_one_vector_for_all_documents_scores_nothing():
    candidates = Candidates([str(i) for i in range(20)] * 2, ["de"] * 20 + ["en"] * 20)
    for vectors in (np.ones((40, 4)), np.full((40, 4), np.nan)):
        results = retrieval(candidates, cosine_scorer(vectors), [("de", "en")])
        assert results["de-en"] == {"R@1": 0.0, "R@10": 0.0, "MRR@10": 0.0, "nDCG@10": 0.0, "queries": 20}


def test_a_pair_without_common_documents_is_left_out_and_all_of_them_is_an_error():
    candidates = Candidates(["1", "2"], ["de", "en"])
    results = retrieval(candidates, cosine_scorer(np.eye(2)), language_pairs(candidates))
    assert results == {}
    with pytest.raises(InputError, match="no document occurs in both languages"):
        macro(results)


def test_macro_weighs_pairs_equally():
    results = {"a-b": metrics_of_ranks(np.array([1, 1, 1])), "b-a": metrics_of_ranks(np.array([11]))}
    assert macro(results)["R@1"] == 0.5
    assert macro(results)["queries"] == 4


@pytest.mark.parametrize(
    ("name", "pair"), [("de-en", ("de", "en")), ("pt-br-en", ("pt-br", "en")), ("en-pt-br", ("en", "pt-br"))]
)
def test_pairs_of_codes_with_hyphens(name, pair):
    assert language_pairs(Candidates(["1"] * 3, ["de", "en", "pt-br"]), [name]) == [pair]


@pytest.mark.parametrize("name", ["de-xx", "de", "deen"])
def test_unknown_pairs_are_named(name):
    with pytest.raises(InputError, match=name):
        language_pairs(Candidates(["1", "1"], ["de", "en"]), [name])
