"""The bench of the loaders: all systems give pairs in the same packing, nothing is left behind, the table adds up."""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launch import ROOT

from hmde_dist.command import InputError
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

sys.path.insert(0, str(ROOT / "tools"))
import bench_stream
from bench_stream import COLD, LOCAL, OURS, STREAMING, WARM, WEBDATASET, Job, Speed

PAIRS = 6


@pytest.fixture
def job(shards):
    def make(system: str, container: str, workers: int = 0) -> Job:
        return Job(system, container, LOCAL, workers, str(shards(container)), PAIRS, 0.1)

    return make


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("system", "container"), [(OURS, "mds"), (OURS, "wds"), (WEBDATASET, "wds")])
def test_a_measurement_counts_whole_batches(job, system, container, workers):
    speed = bench_stream.measure(job(system, container, workers))
    assert speed.seconds >= 0.1
    assert speed.documents > 0 and speed.documents % (2 * PAIRS) == 0
    assert speed.documents < speed.tokens == speed.slots


def test_webdataset_gives_two_documents_of_each_group(job, shards):
    index = ShardIndex.open(shards("wds"))
    reader = GroupReader(index)
    known = {
        tuple(reader[group].document(number)[0].tolist()): group
        for group in range(index.groups)
        for number in range(len(reader[group].languages))
    }
    most = max(index.columns["document_sentences"])
    assert most <= bench_stream.SENTENCES  # else what is packed is no whole document
    seen = set()
    for batch in itertools.islice(bench_stream.webdataset_batches(job(WEBDATASET, "wds")), 3 * index.groups // PAIRS):
        rows = [row[1:-1].tolist() for row in batch.ids.split(batch.lower.starts.diff().tolist())]
        sentences = iter(batch.sentence_rows.tolist())
        documents = [
            tuple(token for _ in range(count) for token in rows[next(sentences)]) for count in batch.sentence_counts
        ]
        assert len(documents) == 2 * PAIRS
        for first, second in zip(documents[:PAIRS], documents[PAIRS:], strict=True):
            assert known[first] == known[second] and first != second
            seen.add(known[first])
    assert len(seen) > index.groups / 2


def test_a_process_of_its_own_leaves_nothing_behind(job, monkeypatch):
    """Of streaming, the one with shared memory."""
    noted: dict[str, int] = {}
    remove = bench_stream.remove_segments
    monkeypatch.setattr(bench_stream, "remove_segments", lambda segments: (noted.update(segments), remove(segments)))
    asked = job(STREAMING, "mds", workers=1)
    files = sorted(Path(asked.folder).rglob("*"))
    speed = bench_stream.run_job(asked)
    assert speed.documents > 0 and speed.documents % (2 * PAIRS) == 0
    assert len(noted) >= 6
    assert noted.items().isdisjoint((entry.name, entry.inode()) for entry in os.scandir(bench_stream.SHARED_MEMORY))
    assert sorted(Path(asked.folder).rglob("*")) == files


def test_segments_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_stream, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(bench_stream.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("000003_locals", "000003_barrier", "000004_locals"):
        (tmp_path / name).write_bytes(b"")
    bench_stream.note_shared_memory("000003_")
    noted = bench_stream._noted(tmp_path / "segments.json")
    (tmp_path / "another").write_bytes(b"")  # made by another process under a name that was ours
    (tmp_path / "another").replace(tmp_path / "000003_barrier")
    bench_stream.remove_segments(noted | {"000003_gone": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"000003_barrier", "000004_locals", "segments.json"}


def test_rounds_turn_the_order_and_a_cold_cache_comes_before_a_warm_one(tmp_path):
    folders = {"mds": tmp_path / "m", "wds": tmp_path / "w"}
    first, second = (
        bench_stream.jobs_of_round(number, folders, [0, 2], 8, 1.0, "http://host", tmp_path) for number in (0, 1)
    )
    assert len(first) == 2 * (4 + 8)
    for jobs in (first, second):
        for cold, warm in itertools.pairwise(jobs):
            if cold.where == COLD:
                assert warm == replace(cold, where=WARM)
        assert {job.system for job in jobs if job.container == "mds"} == {OURS, STREAMING}
        assert all(bool(job.cache) == bool(job.endpoint) == (job.where != LOCAL) for job in jobs)
    local = [[job for job in jobs if job.where == LOCAL] for jobs in (first, second)]
    assert local[1] == local[0][::-1]


def test_the_table_has_medians_and_ratios_within_rounds():
    ours, other = (LOCAL, "mds", 2, OURS), (LOCAL, "mds", 2, STREAMING)
    rounds = [
        {other: Speed(1.0, 10, 900, 1000), ours: Speed(2.0, 40, 4000, 5000)},
        {other: Speed(1.0, 20, 1000, 1000), ours: Speed(1.0, 30, 1000, 1250)},
        {other: Speed(1.0, 30, 1100, 1000), ours: Speed(1.0, 50, 4400, 5500)},
    ]
    lines = bench_stream.table(rounds).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        [OURS, "mds", LOCAL, "2", "30", "2,000", "1,000", "1", "20.0 %"],
        [STREAMING, "mds", LOCAL, "2", "20", "1,000", "500", "0.45 (0.25-1.00)", "0.0 %"],
    ]


def test_how_many_workers_an_h200_needs():
    assert "= 862,500 tokens/s, what 0.17 workers of 5,000,000" in bench_stream.workers_needed(5e6)


def test_sets_that_cannot_be_compared_are_refused(shards, tmp_path):
    mds, wds = shards("mds"), shards("wds")
    assert bench_stream.containers_of([wds, mds], PAIRS, [0, 1]) == {"wds": wds, "mds": mds}
    with pytest.raises(InputError, match="are both mds"):
        bench_stream.containers_of([mds, mds], PAIRS, [0])
    with pytest.raises(InputError, match="set --pairs to that or less"):
        bench_stream.containers_of([mds], 1000, [0])
    with pytest.raises(InputError, match="fewer shards than workers"):
        bench_stream.containers_of([wds], PAIRS, [99])
    with pytest.raises(InputError, match="no shard set"):
        bench_stream.containers_of([tmp_path], PAIRS, [0])


def test_worker_counts():
    assert bench_stream.worker_counts("0,2,1") == [0, 2, 1]
    for text in ("1,1", "-1", "two"):
        with pytest.raises((ValueError, bench_stream.argparse.ArgumentTypeError)):
            bench_stream.worker_counts(text)


def test_the_s3_server_serves_the_set_to_our_loader(job, shards, tmp_path, monkeypatch):
    for name, value in bench_stream.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with bench_stream.s3_server({"wds": shards("wds")}) as endpoint:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        for system in (OURS, WEBDATASET):
            cache = tmp_path / system
            cache.mkdir()
            cold = replace(job(system, "wds"), where=COLD, endpoint=endpoint, cache=str(cache))
            speed = bench_stream.measure(cold)
            assert speed.documents == ShardIndex.open(shards("wds")).groups // PAIRS * 2 * PAIRS
            cached = {path.name for path in cache.rglob("*") if path.is_file()}
            assert sum(name.endswith(".tar") for name in cached) == len(list(shards("wds").glob("*.tar")))
            assert bench_stream.measure(replace(cold, where=WARM)).documents > 0
