from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import SETTINGS, even_index, make_index, plan_of

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import NO_CLUSTER
from hmde_dist.stream import draws
from hmde_dist.stream.mixture import Draws, LanguagePairs, Mixture, Source, pair_counts
from hmde_dist.stream.plan import PlanSettings

PLAN = PlanSettings(**SETTINGS)


def test_a_draw_depends_on_its_keys_alone():
    keys = np.arange(1000)
    whole = draws.uniform(3, "test", 5, keys)
    assert np.array_equal(draws.uniform(3, "test", 5, keys[::-1])[::-1], whole)
    assert draws.uniform(3, "test", 5, 77)[0] == whole[77]
    for other in (
        draws.uniform(4, "test", 5, keys),
        draws.uniform(3, "tests", 5, keys),
        draws.uniform(3, "test", 6, keys),
    ):
        assert not np.isin(other, whole).any()
    assert whole.min() > 0 and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) < 0.1


def test_draws_never_change():
    assert draws.bits(7, "what", 1, np.array([2, 3])).tolist() == [76050235663589463, 16389401024591668219]


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 40_000))
def test_a_part_gives_its_batches_one_after_the_other(seed, weights, start):
    """Across the edges of blocks, too, and wherever one begins to ask."""
    drawn = Draws(seed, "test", np.array(weights))
    seen: dict[int, int] = {}
    for step in range(start, start + 40):
        part, number = drawn.of(step)
        assert seen.get(part, number) == number
        seen[part] = number + 1
    from_start = [Draws(seed, "test", np.array(weights)).of(step)[0] for step in range(60)]
    assert [Draws(seed, "test", np.array(weights)).of(59)[1]] == [from_start[:59].count(from_start[59])]


@pytest.mark.parametrize("edge", [1 << 14, 1 << 15])
def test_numbers_go_on_over_the_edge_of_a_block(edge):
    drawn = Draws(0, "test", np.array([1.0, 2.0]))
    found = [drawn.of(step) for step in range(edge - 50, edge + 50)]
    for part in (0, 1):
        numbers = [number for p, number in found if p == part]
        assert all(after == before + 1 for before, after in pairwise(numbers)) and len(numbers) > 10


def test_every_batch_is_the_next_one_of_its_source():
    indexes = [even_index(64, 8, 4), even_index(200, 20, 4)]
    mixture = Mixture([Source(index, ((0, w),)) for index, w in zip(indexes, (1.0, 3.0), strict=True)], PLAN)
    plans, numbers = [plan_of(index) for index in indexes], [0, 0]
    for step in range(300):
        batch = mixture.batch(step)
        expected = plans[batch.source].batch(numbers[batch.source])
        assert np.array_equal(batch.groups, expected.groups) and np.array_equal(batch.documents, expected.documents)
        state = mixture.state(step)
        at = divmod(numbers[batch.source], plans[batch.source].batches_per_epoch)
        assert (state["source"], state["epoch"], state["batch"]) == (batch.source, *at)
        numbers[batch.source] += 1
    assert 0.18 < numbers[0] / 300 < 0.32


def test_weights_go_in_straight_lines_between_their_points():
    sources = [
        Source(even_index(64, 8, 4), ((0, 1.0), (1000, 0.0))),
        Source(even_index(64, 8, 4), ((0, 0.0), (1000, 1.0))),
    ]
    mixture = Mixture(sources, PLAN)
    drawn = np.array([mixture.batch(step).source for step in range(1500)])
    assert [abs(drawn[a:b].mean() - m) < 0.1 for a, b, m in ((0, 200, 0.1), (400, 600, 0.5), (1000, 1500, 1.0))] == [
        True
    ] * 3
    assert drawn[1000:].all()


def test_a_step_without_any_weight_is_refused():
    sources = [Source(even_index(64, 8, 4), points) for points in (((0, 1.0), (9, 0.0)), ((0, 0.0),))]
    with pytest.raises(InputError, match="at step 9 the weight of every source is zero"):
        Mixture(sources, PLAN)


def mixed_index():
    draw = np.random.default_rng(0)
    languages = [np.flatnonzero(draw.random(4) < (0.9, 0.9, 0.5, 0.1)).tolist() or [0] for _ in range(600)]
    return make_index(languages, draw.integers(0, 30, 600))


def test_pairs_of_a_batch_are_in_two_languages_and_rare_pairs_come_more_often_than_they_are():
    index = mixed_index()
    counts, pairs = pair_counts(index), LanguagePairs(index, PLAN, 0)
    first, language = index.columns["group_documents"].astype(int), index.columns["document_language"]
    found: dict[tuple, list] = {}
    for step in range(400):
        batch = pairs.batch(step)
        drawn = language[first[batch.groups][:, None] + batch.documents]
        ((one, other),) = {tuple(row) for row in drawn.tolist()}
        assert one < other
        found.setdefault((one, other), []).append(batch)
    assert set(found) == set(pairs.pairs)
    wanted = np.array([counts[pair] for pair in pairs.pairs], dtype=float) ** SETTINGS["temperature"]
    shares = np.array([len(found[pair]) for pair in pairs.pairs]) / 400
    assert np.abs(shares - wanted / wanted.sum()).max() < 0.08
    for pair, batches in found.items():
        assert len({group for batch in batches for group in batch.groups.tolist()}) <= counts[pair]
        an_epoch = [g for batch in batches[: counts[pair] // PLAN.pairs] for g in batch.groups.tolist()]
        assert len(an_epoch) == len(set(an_epoch))
    assert pairs.left_out == sum(0 < counts[a, b] < PLAN.pairs for a in range(4) for b in range(a + 1, 4))


def test_no_pair_with_a_batch_of_groups_is_said():
    index = make_index([[0, 1]] * 10 + [[2, 3]] * 10, [NO_CLUSTER] * 20)
    with pytest.raises(InputError, match="no language pair has 16 groups"):
        Mixture([Source(index)], PLAN, one_pair=True)
