import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import PROGRAMS, environment, finish, start

from hmde_dist.command import InputError
from hmde_dist.stream.batch import DocumentFacts, PackedBatch, Segments
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import RankBatch, RankBatches, batches, packing_settings
from hmde_dist.stream.mixture import Mixture, Source
from hmde_dist.stream.plan import PlanSettings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sliding_windows import SlidingWindows

PAIRS, SENTENCES, STEPS = 8, 6, 9  # of 4 steps an epoch
CPU = torch.device("cpu")


def open_plan(folder, window="first", windows=None) -> Mixture:
    settings = PlanSettings(PAIRS, 0.5, 2, 0.3, SENTENCES, window, seed=3, windows=windows)
    return Mixture([Source(ShardIndex.open(folder))], settings)


@pytest.fixture(scope="module")
def plan(shards) -> Mixture:
    return open_plan(shards("wds"))


def load(plan, rank=0, world=1, start=0, stop=STEPS, workers=0, **settings) -> list[RankBatch]:
    return list(batches(RankBatches(plan, rank, world, **settings), range(start, stop), workers, CPU))


def assert_same(one: list[RankBatch], other: list[RankBatch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.imbalance == right.imbalance and len(left.chunks) == len(right.chunks)
        for chunk, same in zip(left.chunks, right.chunks, strict=True):
            for field in fields(PackedBatch):
                mine, yours = getattr(chunk, field.name), getattr(same, field.name)
                if isinstance(mine, Segments):
                    assert mine.runs == yours.runs and torch.equal(mine.starts, yours.starts), field.name
                elif isinstance(mine, DocumentFacts):
                    assert repr(mine) == repr(yours)
                    assert all(map(np.array_equal, vars(mine).values(), vars(yours).values()))
                elif isinstance(mine, torch.Tensor):
                    assert torch.equal(mine, yours), field.name
                else:
                    assert mine == yours, field.name


def documents_of(batch: RankBatch) -> list[tuple]:
    """(group, tokens of its sentences with special ones) of every document of a batch."""
    found: list[tuple] = [()] * batch.documents
    for chunk in batch.chunks:
        rows = [tuple(row.tolist()) for row in chunk.ids.split(chunk.lower.starts.diff().tolist())]
        sentences = iter(rows[row] for row in chunk.sentence_rows)
        facts = chunk.facts
        for place, group, count in zip(facts.numbers, facts.groups, chunk.sentence_counts, strict=True):
            found[place] = (int(group), tuple(next(sentences) for _ in range(count)))
    return found


def test_batches_hold_the_documents_of_the_plan(plan):
    settings, reader = packing_settings(plan.indexes[0], SENTENCES), GroupReader(plan.indexes[0])
    for step, batch in enumerate(load(plan)):
        planned = plan.batch(step)
        expected = []
        for side in (0, 1):
            for group, document in zip(planned.groups.tolist(), planned.documents[:, side].tolist(), strict=True):
                tokens, lengths = reader[group].document(document)
                tokens = tokens.tolist()
                sentences = []
                for length in lengths[:SENTENCES].tolist():
                    sentences.append((settings["cls_id"], *tokens[:length], settings["sep_id"]))
                    tokens = tokens[length:]
                expected.append((group, tuple(sentences)))
        assert documents_of(batch) == expected


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_same_documents(plan, world):
    whole = load(plan)
    parts = [load(plan, rank, world) for rank in range(world)]
    for step in range(STEPS):
        together = [document for part in parts for document in documents_of(part[step])]
        assert sorted(together) == sorted(documents_of(whole[step]))


@pytest.mark.parametrize("world", [1, 4])
def test_the_second_half_of_a_batch_answers_the_first(plan, world):
    for rank in range(world):
        for batch in load(plan, rank, world):
            pairs = PAIRS // world
            groups = torch.from_numpy(batch.chunks[0].facts.groups)
            assert groups.shape == (2 * pairs,)
            assert torch.equal(groups[:pairs], groups[pairs:])
            documents = documents_of(batch)
            assert all(documents[row] != documents[row + pairs] for row in range(pairs))


@pytest.mark.parametrize("container", ["mds", "wds"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(plan, shards, container, workers):
    assert_same(load(open_plan(shards(container)), 1, 2, workers=workers), load(plan, 1, 2))


def test_both_containers_give_the_same(plan, shards):
    assert_same(load(open_plan(shards("mds"))), load(plan))


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (4, 0), (7, 2)])
def test_start_at_a_later_step_gives_the_same(shards, plan, start, workers):
    assert_same(load(open_plan(shards("wds")), start=start, workers=workers), load(plan)[start:])


def test_no_steps_left_is_no_error(plan):
    assert load(plan, start=STEPS, stop=STEPS) == []


def test_a_process_that_leaves_a_batch_unread_ends(shards, tmp_path):
    """Loader workers do not answer SIGTERM, by which multiprocessing ends them at exit."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import sys, torch\n"
        "from hmde_dist.stream.index import ShardIndex\n"
        "from hmde_dist.stream.loader import RankBatches, batches\n"
        "from hmde_dist.stream.mixture import Mixture, Source\n"
        "from hmde_dist.stream.plan import PlanSettings\n"
        "mixture = Mixture([Source(ShardIndex.open(sys.argv[1]))], PlanSettings(8, 0.5, 2, 0.3, 6, 'first', 0))\n"
        "stream = batches(RankBatches(mixture, 0, 1), range(500), 2, torch.device('cpu'))\n"
        "import atexit; atexit.register(stream.close)\n"
        "def fail():\n"
        "    next(stream)\n"
        "    raise RuntimeError('of the loop')\n"
        "fail()\n"
    )
    job = finish(start([PROGRAMS / "python", script, shards("mds")], environment(), tmp_path))
    assert job.code == 1 and "of the loop" in job.output


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shard_is_one_clear_line_from_workers_too(shards, tmp_path, workers):
    index = ShardIndex.open(shutil.copytree(shards("wds"), tmp_path / "shards"))
    paths = [index.folder / entry["name"] for entry in index.manifest["shards"]]
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError) as refused:
        load(open_plan(index.folder), workers=workers)
    assert re.match(r"\S+\.tar: sample \d+ is damaged \(", str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_window_begins_where_the_plan_says(shards, workers):
    mixture = open_plan(shards("mds"), "random")
    reader = GroupReader(mixture.indexes[0])
    moved = 0
    for step, batch in enumerate(load(mixture, workers=workers)):
        planned, expected, whole = mixture.batch(step), [], []
        for side in (0, 1):
            for group, document, first in zip(
                planned.groups.tolist(), planned.documents[:, side], planned.starts[:, side], strict=True
            ):
                tokens, lengths = reader[group].document(int(document))
                pieces = np.split(tokens, np.cumsum(lengths)[:-1])[first : first + SENTENCES]
                expected.append((group, tuple(tuple(piece.tolist()) for piece in pieces)))
                whole.append((len(lengths), first))
                moved += first > 0
        assert [(group, tuple(s[1:-1] for s in sentences)) for group, sentences in documents_of(batch)] == expected
        facts = batch.chunks[0].facts
        assert [*zip(facts.sentences.tolist(), facts.starts.tolist(), strict=True)] == whole
    assert moved > 10


@pytest.mark.parametrize("window", ["first", "random"])
def test_documents_are_cut_into_windows_of_their_tokens(shards, window):
    windows = SlidingWindows(20, 15)
    mixture = open_plan(shards("mds"), window, windows)
    index, reader, moved = mixture.indexes[0], GroupReader(mixture.indexes[0]), 0
    part = RankBatches(mixture, 0, 1, chunk_tokens=700)
    for step in range(STEPS):
        planned, expected, tokens = mixture.batch(step), [], 0
        for side in (0, 1):
            for group, document, first in zip(
                planned.groups.tolist(), planned.documents[:, side], planned.starts[:, side], strict=True
            ):
                ids = reader[group].document(int(document))[0].tolist()
                whole = [tuple(ids[at : at + 20]) for at in range(0, len(ids), 15) if at == 0 or at + 5 < len(ids)]
                assert first == 0 or first + SENTENCES <= len(whole)
                expected.append((group, tuple(whole[first : first + SENTENCES])))
                number = int(index.columns["group_documents"][group]) + int(document)
                assert index.segments(windows, number) == len(whole)
                tokens += sum(len(piece) + 2 for piece in whole[:SENTENCES])
                moved += first > 0
        batch = part[step]
        assert [(group, tuple(s[1:-1] for s in sentences)) for group, sentences in documents_of(batch)] == expected
        # The estimate that balances ranks and chunks is exact for runs from the beginning.
        assert part._tokens(0, planned.groups[:, None], planned.documents).sum() == tokens
        assert len(batch.chunks) == -(-tokens // 700) > 1
        assert window == "random" or batch.tokens == tokens
    assert (moved > 10) == (window == "random")


def test_explicit_negatives_follow_the_pairs_in_the_language_of_their_side(plan):
    index, reader = plan.indexes[0], GroupReader(plan.indexes[0])
    for rank in range(2):
        for step, batch in enumerate(load(plan, rank, 2, hard_negatives=True)):
            pairs, documents = PAIRS // 2, documents_of(batch)
            assert len(documents) == 4 * pairs
            mine = RankBatches(plan, rank, 2).part(step)[0]
            for side in (0, 1):
                for row in range(pairs):
                    group, sentences = documents[(2 + side) * pairs + row]
                    language = reader[int(mine.groups[row])].languages[int(mine.documents[row, side])]
                    sample = reader[group]
                    tokens, _ = sample.document(sample.languages.index(language))
                    assert group != mine.groups[row] and sentences[0][1] == tokens[0]
                    of = [set(index.columns["category"][slice(*index.columns["group_categories"][g : g + 2])]) for g in (group, mine.groups[row])]  # fmt: skip
                    assert of[0] & of[1]


@pytest.mark.parametrize("hard_negatives", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_chunks_hold_the_same_documents_and_ranks_have_as_many(plan, world, hard_negatives):
    whole = [load(plan, rank, world, hard_negatives=hard_negatives) for rank in range(world)]
    cut = [load(plan, rank, world, hard_negatives=hard_negatives, chunk_tokens=300) for rank in range(world)]
    for step in range(STEPS):
        assert len({len(part[step].chunks) for part in cut}) == 1 and len(cut[0][step].chunks) > 1
        for one, other in zip(whole, cut, strict=True):
            assert documents_of(one[step]) == documents_of(other[step])
            assert all(len(chunk.facts.numbers) for chunk in other[step].chunks)
            assert max(chunk.tokens for chunk in other[step].chunks) < 2 * 300


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(0, 2),
    st.integers(0, 40),
    st.integers(1, 3),
    st.sampled_from(["first", "random"]),
)
@settings(max_examples=200)
def test_any_shape_finds_the_same_global_batches(shards, world, workers, start, sources, window):
    """Ranks, workers, the step at which one begins, and the number of sources mixed."""
    folders = [shards("mds"), shards("wds"), shards("mds")][:sources]
    kind = PlanSettings(24, 0.5, 2, 0.3, SENTENCES, window, seed=3)

    def mixture():
        return Mixture([Source(ShardIndex.open(f), ((0, 1.0), (30, n + 1.0))) for n, f in enumerate(folders)], kind)

    whole, parts = mixture(), [[] for _ in range(2)]
    for rank in range(world):
        # One rank's loader has workers; forking them for each rank would show nothing more.
        loaded = load(mixture(), rank, world, start, start + 2, workers if rank == 0 else 0)
        for part, batch in zip(parts, loaded, strict=True):
            part += documents_of(batch)
    for step, part in enumerate(parts):
        assert sorted(part) == sorted(documents_of(RankBatches(whole, 0, 1)[start + step]))
