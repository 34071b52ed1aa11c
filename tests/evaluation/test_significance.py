import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hmde_dist.evaluation.significance import compare, holm, mean_interval, multiplicities, paired_tests


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_tests_are_scipys(seed):
    random = np.random.default_rng(seed)
    one, other = random.random(30), random.random(30)
    tests = paired_tests(one, other)
    assert tests["difference"] == pytest.approx(one.mean() - other.mean())
    assert tests["p_t"] == pytest.approx(stats.ttest_rel(one, other).pvalue)
    # With 30 queries both tests see nearly the same; 9,999 draws are exact to about 0.01.
    assert tests["p_randomisation"] == pytest.approx(tests["p_t"], abs=0.03)


def test_few_queries_are_randomised_in_all_ways():
    one, other = np.array([0.9, 0.8, 0.7, 0.4, 0.6]), np.array([0.1, 0.5, 0.2, 0.5, 0.3])
    difference = one - other
    swapped = [np.mean(difference * signs) for signs in itertools.product([1, -1], repeat=5)]
    expected = np.mean(np.abs(swapped) >= abs(difference.mean()) - 1e-12)
    assert paired_tests(one, other)["p_randomisation"] == pytest.approx(expected)


def test_systems_that_are_alike_or_ask_one_query_prove_nothing():
    assert paired_tests([0.5, 0.2], [0.5, 0.2]) == {"difference": 0.0, "p_randomisation": 1.0, "p_t": 1.0}
    assert paired_tests([0.5], [0.2])["p_randomisation"] == 1.0
    assert paired_tests([1.0] * 20, [0.0] * 20)["p_t"] == 0.0


def test_holm_rejects_as_the_step_down_procedure_does():
    random = np.random.default_rng(3)
    for _ in range(50):
        p = random.random(8) ** 4
        order, rejected = np.argsort(p), set()
        for step, number in enumerate(order):
            if p[number] > 0.05 / (8 - step):
                break
            rejected.add(int(number))
        assert {n for n, corrected in enumerate(holm(p)) if corrected <= 0.05} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_comparisons_are_corrected_together():
    random = np.random.default_rng(0)
    values = {name: {pair: random.random(20) for pair in ("a-b", "b-a")} for name in ("ours", "x", "y")}
    rows = compare(values, "ours")
    assert [(row["against"], row["part"]) for row in rows] == list(itertools.product(("x", "y"), ("a-b", "b-a")))
    assert [row["p_t_holm"] for row in rows] == holm([row["p_t"] for row in rows])


def test_the_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.2)
    assert mean_interval(values) == [low, high]
    assert (multiplicities(7, seed=0).sum(axis=1) == 7).all()
