import hashlib
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from launch import PROGRAMS, environment, finish, start

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import NO_CLUSTER
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.plan import PLAN_VERSION, GlobalBatch, Plan, PlanSettings


def make_index(languages_of_groups, clusters, languages: int = 4) -> ShardIndex:
    """An index in memory, of groups with these language numbers and categories."""
    counts = [len(group) for group in languages_of_groups]
    columns = {
        "group_cluster": np.array(clusters, dtype=np.uint32),
        "group_documents": np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        "document_language": np.array([n for group in languages_of_groups for n in group], dtype=np.uint16),
        "document_sentences": np.arange(1, sum(counts) + 1, dtype=np.uint32) % 30 + 1,
    }
    manifest = {"groups": len(counts), "languages": [f"l{number}" for number in range(languages)]}
    manifest |= {"columns": [], "shards": []}
    return ShardIndex(Path("shards"), manifest, columns)


def even_index(groups: int, clusters: int, size: int) -> ShardIndex:
    """`groups` groups of four languages: `clusters` categories of `size` groups, the others without category."""
    numbers = np.full(groups, NO_CLUSTER)
    numbers[: clusters * size] = 1 + np.arange(clusters * size) // size
    return make_index([range(4)] * groups, np.random.default_rng(0).permutation(numbers))


SETTINGS = {
    "pairs": 16,
    "neighbours": 0.5,
    "neighbour_group": 4,
    "temperature": 0.3,
    "sentences": 8,
    "window": "random",
    "seed": 0,
}


def plan_of(index: ShardIndex, **changes) -> Plan:
    return Plan(index, PlanSettings(**SETTINGS | changes))


ANY_PAIRS = st.integers(1, 12)


@st.composite
def plans(draw, pairs=ANY_PAIRS):
    """A function that makes the same plan anew, and its index."""
    languages = st.lists(st.sampled_from(range(4)), unique=True, min_size=1)
    groups = draw(st.lists(st.tuples(languages, st.integers(0, 4)), max_size=30))
    groups += [([0, 1], 1)] * 12  # never fewer than one batch
    index = make_index(*zip(*groups, strict=True))
    settings = {
        "pairs": draw(pairs),
        "neighbours": draw(st.floats(0, 1)),
        "neighbour_group": draw(st.integers(2, 6)),
        "temperature": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**32)),
    }
    return (lambda: plan_of(index, **settings)), index


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    steps = range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
    return np.stack([plan.batch(step).groups for step in steps])


@given(plans(), st.integers(0, 3))
def test_a_group_occurs_at_most_once_an_epoch(case, epoch):
    make, index = case
    plan = make()
    versions = np.diff(index.columns["group_documents"])
    usable = np.flatnonzero(versions > 1)
    assert plan.batches_per_epoch == len(usable) // plan.settings.pairs
    groups = epoch_of(plan, epoch).ravel()
    assert len(groups) == len(set(groups.tolist())) == plan.batches_per_epoch * plan.settings.pairs
    assert set(groups.tolist()) <= set(usable.tolist())


@given(plans(), st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 60))
def test_a_batch_does_not_depend_on_what_was_asked_before(case, before, step):
    make, _ = case
    used = make()
    for other in before:
        used.batch(other)
    fresh, again = make().batch(step), used.batch(step)
    assert np.array_equal(fresh.groups, again.groups)
    assert np.array_equal(fresh.documents, again.documents)
    assert np.array_equal(fresh.starts, again.starts)


@given(plans(), st.integers(0, 60))
def test_a_pair_is_two_documents_of_its_group(case, step):
    make, index = case
    batch = make().batch(step)
    versions = np.diff(index.columns["group_documents"].astype(int))[batch.groups]
    assert batch.documents.shape == (len(batch.groups), 2)
    assert (batch.documents >= 0).all()
    assert (batch.documents < versions[:, None]).all()
    assert (batch.documents[:, 0] != batch.documents[:, 1]).all()


@given(plans(st.sampled_from([1, 6, 8, 12])), st.integers(0, 60), st.integers(0, 2**32))
def test_ranks_share_a_batch_without_rest(case, step, seed):
    make, _ = case
    batch = make().batch(step)
    whole = sorted(zip(batch.groups.tolist(), batch.documents.tolist(), strict=True))
    tokens = np.random.default_rng(seed).integers(1, 50, len(batch.groups))
    for world in (world for world in range(1, len(whole) + 1) if len(whole) % world == 0):
        parts = [batch.of_rank(rank, world, tokens) for rank in range(world)]
        assert {len(part.groups) for part in parts} == {len(whole) // world}
        assert whole == sorted(
            pair for part in parts for pair in zip(part.groups.tolist(), part.documents.tolist(), strict=True)
        )


def test_one_rank_has_the_batch_as_it_is():
    batch = plan_of(even_index(64, 8, 4)).batch(1)
    assert np.array_equal(batch.of_rank(0, 1, np.arange(16)).groups, batch.groups)


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_ranks_get_about_the_same_tokens(world):
    """On log-normal lengths; what no dealing can beat is the mean, or the one longest pair."""
    batch = GlobalBatch(0, 0, np.arange(256), *np.zeros((2, 256, 2), dtype=np.int64))
    for seed in range(20):
        tokens = np.random.default_rng(seed).lognormal(6, 1, size=256).astype(np.int64)
        loads = [tokens[batch.of_rank(rank, world, tokens).groups].sum() for rank in range(world)]
        assert max(loads) <= 1.08 * max(np.mean(loads), tokens.max())


def test_epochs_and_seeds_differ():
    index = even_index(64, 8, 4)
    plan, other = plan_of(index), plan_of(index, **{"seed": 1})
    first = epoch_of(plan, 0)
    assert not np.array_equal(first, epoch_of(plan, 1))
    assert not np.array_equal(first, epoch_of(other, 0))


def test_pairs_of_a_group_are_drawn_anew_each_epoch():
    plan = plan_of(even_index(16, 0, 1))
    drawn = [dict(zip(plan.batch(e).groups.tolist(), plan.batch(e).documents.tolist(), strict=True)) for e in range(8)]
    assert all(len({tuple(epoch[group]) for epoch in drawn}) > 1 for group in range(16))


def test_groups_left_over_in_one_epoch_come_in_others():
    plan = plan_of(even_index(31, 4, 4))
    assert plan.batches_per_epoch == 1
    assert set(np.concatenate([plan.batch(epoch).groups for epoch in range(16)]).tolist()) == set(range(31))


def whole_clusters(index: ShardIndex, batch: np.ndarray) -> int:
    """Categories all of whose groups lie in the batch."""
    clusters = index.columns["group_cluster"]
    return sum(
        bool(np.isin(np.flatnonzero(clusters == cluster), batch).all())
        for cluster in np.unique(clusters[clusters != NO_CLUSTER])
    )


@pytest.mark.parametrize(
    ("share", "pairs", "size", "expected"),
    [(0.5, 32, 4, 4), (0.25, 32, 4, 2), (1.0, 32, 4, 8), (1.0, 31, 4, 7), (0.3, 32, 4, 2), (1.0, 6, 4, 1)],
)
def test_promised_share_of_neighbours_is_met(share, pairs, size, expected):
    index = even_index(480, 120, size)
    plan = plan_of(index, **{"pairs": pairs, "neighbours": share, "neighbour_group": size})
    assert {whole_clusters(index, batch) for batch in epoch_of(plan, 0)} == {expected}


@given(st.floats(0, 1), st.integers(1, 64), st.integers(2, 8))
def test_share_is_met_as_nearly_as_whole_runs_allow(share, pairs, size):
    assume(size <= pairs)  # the recipe refuses the rest
    plan = plan_of(even_index(64, 0, 1), **{"pairs": pairs, "neighbours": share, "neighbour_group": size})
    possible = range(size if share else 0, pairs + 1, size)  # a share above zero is at least one run
    assert plan.settings.neighbour_groups in possible
    assert abs(plan.settings.neighbour_groups - share * pairs) == pytest.approx(
        min(abs(n - share * pairs) for n in possible)
    )


def test_few_neighbours_are_spread_evenly():
    index = even_index(320, 13, 4)
    counts = [whole_clusters(index, batch) for batch in epoch_of(plan_of(index), 0)]
    assert sorted(counts) == [0] * 7 + [1] * 13


def test_neighbours_change_every_epoch():
    index = make_index([range(4)] * 64, [1] * 64)
    plan = plan_of(index, **{"neighbours": 1.0})
    met = [{frozenset(run.tolist()) for run in epoch_of(plan, epoch).reshape(-1, 4)} for epoch in range(3)]
    assert not met[0] & met[1] & met[2]


def test_groups_without_category_are_nobodys_neighbours():
    index = make_index([range(4)] * 64, [NO_CLUSTER] * 64)
    assert np.array_equal(
        epoch_of(plan_of(index), 0),
        epoch_of(plan_of(make_index([range(4)] * 64, range(1, 65))), 0),
    )


def test_temperature_favours_rare_languages():
    """Language 2 is in 40 of 400 groups; of three documents two are drawn."""
    index = make_index([[0, 1, 2]] * 40 + [[0, 1]] * 360, [NO_CLUSTER] * 400)

    def share_of_rare(temperature):
        plan = plan_of(index, **{"pairs": 400, "temperature": temperature})
        batches = [plan.batch(epoch) for epoch in range(8)]
        return np.mean([(batch.documents[batch.groups < 40] == 2).any(axis=1).mean() for batch in batches])

    assert share_of_rare(1.0) == pytest.approx(2 / 3, abs=0.07)
    # First draw 10 : 1 : 1 in favour of the rare one, second draw 10 : 1.
    assert share_of_rare(0.0) == pytest.approx(10 / 12 + 2 / 12 * 10 / 11, abs=0.02)
    assert share_of_rare(1.0) + 0.05 < share_of_rare(0.3) < share_of_rare(0.0)


def test_too_few_groups_say_how_many_there_are():
    index = make_index([[0, 1]] * 5 + [[0]] * 20, [NO_CLUSTER] * 25)
    with pytest.raises(InputError, match=r"5 groups in two or more languages.*set data\.pairs_per_batch to 5 or less"):
        plan_of(index)
    assert plan_of(index, **{"pairs": 5}).batches_per_epoch == 1


def test_no_pair_at_all_is_not_answered_with_a_batch_of_none():
    with pytest.raises(InputError, match="two or more languages") as refused:
        plan_of(make_index([[0]] * 20, [NO_CLUSTER] * 20))
    assert "to 0 or less" not in str(refused.value)


def test_a_window_lies_inside_its_document_and_moves():
    index = make_index([range(4)] * 64, [NO_CLUSTER] * 64)
    sentences = index.columns["document_sentences"].reshape(64, 4).astype(int)
    seen: dict[tuple, set] = {}
    plan = plan_of(index)
    for epoch in range(12):
        for step in range(4):
            batch = plan.batch(4 * epoch + step)
            longest = np.maximum(sentences[batch.groups[:, None], batch.documents] - 8, 0)
            assert (batch.starts >= 0).all() and (batch.starts <= longest).all()
            for group, documents, starts in zip(batch.groups, batch.documents, batch.starts, strict=True):
                seen.setdefault((group, documents[0]), set()).add(int(starts[0]))
    assert sum(len(starts) > 1 for starts in seen.values()) > 20
    assert not plan_of(index, window="first").batch(0).starts.any()


def test_twenty_million_groups_plan_in_memory_that_a_node_has_to_spare(tmp_path):
    """The whole process, the columns of its index included, stays within 1 GiB; at any batch alike."""
    script = tmp_path / "large.py"
    script.write_text(textwrap.dedent(LARGE), encoding="utf-8")
    job = finish(start([PROGRAMS / "python", script], environment(), tmp_path))
    assert job.code == 0, job.output
    assert int(job.output.split()[-1]) <= 1024


LARGE = """
    from pathlib import Path
    import numpy as np
    from hmde_dist.stream.index import ShardIndex
    from hmde_dist.stream.plan import Plan, PlanSettings

    groups = 20_000_000
    draw = np.random.default_rng(0)
    columns = {
        "group_cluster": np.minimum(draw.zipf(1.3, groups // 100), 400_000).astype(np.uint32).repeat(100),
        "group_documents": np.arange(groups + 1, dtype=np.uint32) * 2,
        "document_language": np.tile(np.array([0, 1], dtype=np.uint16), groups),
    }
    index = ShardIndex(Path("shards"), {"groups": groups, "languages": ["a", "b"]}, columns)
    plan = Plan(index, PlanSettings(16384, 0.5, 4, 0.3, 32, "first", 0))
    for step in (plan.batches_per_epoch - 1, 0):
        assert len(set(plan.batch(step).groups.tolist())) == 16384
    # Not `ru_maxrss`, in which a process starts with the peak of its parent.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) // 1024)
"""


def test_plan_never_changes():
    """A run that is resumed with newer code or numpy must meet the same pairs: else raise PLAN_VERSION."""
    plan = plan_of(even_index(100, 10, 5), **{"seed": 7})
    digest = hashlib.sha256()
    for step in range(2 * plan.batches_per_epoch):
        batch = plan.batch(step)
        digest.update(np.column_stack([batch.groups, batch.documents, batch.starts]).astype("<i8").tobytes())
    assert (PLAN_VERSION, digest.hexdigest()[:16]) == (2, "33a92c5bb6478350")


def test_several_pairs_of_a_group_are_of_different_documents_as_far_as_it_has_them():
    index = make_index([range(4), range(3), range(2), range(4)] * 4, [NO_CLUSTER] * 16)
    plan = plan_of(index, pairs=16, pairs_per_group=2, neighbours=0.0)
    assert plan.batches_per_epoch == 2 and plan.settings.groups == 8
    seen = []
    for number in range(2):
        batch = plan.batch(number)
        assert batch.groups[::2].tolist() == batch.groups[1::2].tolist() and len(set(batch.groups.tolist())) == 8
        seen += batch.groups[::2].tolist()
        for pair in range(0, 16, 2):
            documents = batch.documents[pair : pair + 2]
            assert all(a != b for a, b in documents.tolist())
            assert len(set(documents.ravel().tolist())) == [4, 3, 2, 4][batch.groups[pair] % 4]
    assert sorted(seen) == list(range(16))
    # The first pair is the one that a group has by itself.
    alone = plan_of(index, pairs=8, neighbours=0.0).batch(0)
    assert alone.documents.tolist() == plan.batch(0).documents[::2].tolist()
