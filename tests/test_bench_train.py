"""The bench of the training step: it runs every kind of step, leaves nothing behind, and its ratios are ratios."""

import argparse
import re
import shutil
import sys

import pytest
import torch
from launch import PROGRAMS, ROOT, finish, start, torchrun, write_recipe

from hmde_dist import benchmark
from hmde_dist.command import InputError
from hmde_dist.engine.step_parts import PARTS
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import load_recipe
from hmde_dist.topology import World

sys.path.insert(0, str(ROOT / "tools"))
import bench_train
from bench_train import Pace, Turn

TOOL = ROOT / "tools" / "bench_train.py"


@pytest.fixture
def recipe(shards, tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", shards("mds"), engine={"chunk_tokens": 500})


def run(*arguments, ranks: int = 1):
    command = [PROGRAMS / "python"] if ranks == 1 else torchrun(ranks)
    return finish(start([*command, TOOL, *arguments]), seconds=600)


def test_one_command_measures_the_step_and_compares_it_with_all_others(recipe, shards, tmp_path):
    folder = tmp_path / "data"  # where no other test leaves vectors
    shutil.copytree(shards("mds"), folder / "shards")
    before = set(folder.iterdir())
    job = run(
        recipe, "--shards", folder / "shards", "--reference", "padded", "--cache", "--frozen", "--rounds=1", "--steps=1", "--cpu-seconds",
    )  # fmt: skip
    assert job.code == 0, job.output
    assert set(folder.iterdir()) == before  # the frozen vectors are gone
    assert re.search(r"padding +0\.00 %", job.output)
    shares = {
        part: float(re.search(rf"\| {re.escape(part)} .* ([\d.]+) % \|", job.output)[1]) for part in (*PARTS, "sum")
    }
    assert sum(shares[part] for part in PARTS) == pytest.approx(shares["sum"], abs=0.5)
    assert shares["sum"] == pytest.approx(100, abs=10)  # a millisecond is some per cent of so small a step
    for title in ("this project over padded reference", "one chunk over \\d+ chunks", "frozen over this project"):
        (ratio,) = re.findall(rf"^{title}: ([\d.]+) \(", job.output, re.MULTILINE)
        assert float(ratio) > 0
    assert re.search(r"[\d,]+ sentence vectors, computed once: [\d.]+ s", job.output)
    (padding,) = re.findall(r"\| padded reference .* ([\d.]+) % \|", job.output)
    assert float(padding) > 5


def test_two_ranks_measure_together(recipe):
    job = run(recipe, "--reference", "padded", "--rounds=1", "--steps=1", "engine.zero_stage=2", ranks=2)
    assert job.code == 0, job.output
    assert job.output.count("beside the padded reference") == 1
    assert "2 ranks on CPU" in job.output


def test_memory_is_measured_in_processes_of_their_own(recipe, tmp_path):
    job = run(recipe, "--memory-plot", tmp_path / "memory.png")
    assert job.code == 0, job.output
    rows = re.findall(r"^\| *([\d,]+) +\| +(\d+) \| +([\d,.]+) \|", job.output, re.MULTILINE)
    assert [int(documents) for documents, _, _ in rows] == [16, 32, 64]
    chunks = [int(count) for _, count, _ in rows]
    assert 1 < chunks[0] < chunks[1] < chunks[2]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "overrides", "world", "message"),
    [
        ({"cache": True}, ["engine.chunk_tokens=null"], 1, "set engine.chunk_tokens"),
        ({}, [], 3, "data.pairs_per_batch=8 is not divisible by 3 ranks"),
        ({}, ["model.lower.frozen=true"], 1, "add --frozen"),
        ({"synthetic": 8}, [], 2, "run on one rank"),
        ({"cpu_seconds": True}, [], 2, "use one rank on a CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, options, overrides, world, message):
    args = {"cache": False, "memory_plot": None, "synthetic": None, "cpu_seconds": False} | options
    with pytest.raises(InputError, match=message):
        bench_train.check(
            argparse.Namespace(**args), load_recipe(recipe, overrides), World(0, world, 0, world, torch.device("cpu"))
        )


def test_too_few_groups_for_three_sizes_of_batch_are_refused(recipe):
    asked = load_recipe(recipe, ["data.pairs_per_batch=16"])  # of 37 groups
    bench = bench_train.Bench(asked, open_mixture(asked), World(0, 1, 0, 1, torch.device("cpu")))
    with pytest.raises(InputError, match="lower it to 9 or less"):
        bench_train.measure_memory(argparse.Namespace(), bench)


def test_a_comparison_gives_medians_and_the_range_of_the_ratio():
    def pair(fast: float, slow: float) -> tuple[Turn, Turn]:
        """100 documents in these seconds, one of them reading."""
        return Turn(fast, 1.0, 100, 900, 900, 0.0), Turn(slow, 1.0, 100, 900, 1800, 0.0)

    text = bench_train.comparison(("ours", "theirs"), [pair(2, 10), pair(2, 8), pair(3, 9)])
    assert "ours over theirs: 4.00 (3.00 to 5.00); without reading 7.00 (4.00 to 9.00)" in text
    ours, theirs = (line for line in text.splitlines() if re.match(r"\| (ours|theirs) ", line))
    assert [cell.strip() for cell in ours.split("|")[2:-1]] == ["50.0", "100.0", "450", "0.0 %"]
    assert [cell.strip() for cell in theirs.split("|")[2:-1]] == ["11.1", "12.5", "100", "50.0 %"]


def test_rounds_take_different_batches_and_none_is_the_one_for_warming_up():
    pace = Pace(rounds=3, steps=2)
    assert [list(pace.numbers(number)) for number in range(3)] == [[1, 2], [3, 4], [5, 6]]


def test_the_memory_table_counts_growth_from_the_smallest_batch():
    mib = 2**20
    rows = [
        {"documents": 128 << n, "chunks": 2 << n, "peak": (500 + n) * mib, "vectors": mib << n, "ids": 4 * mib << n}
        for n in range(3)
    ]
    last = bench_train.memory_table(rows).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["512", "8", "502.0", "2.0", "4.0", "16.0"]


def test_matmul_speed_is_that_of_the_fastest_product():
    ticks = iter([0, 4, 10, 12, 20, 23])  # three products, of 4, 2 and 3 seconds
    assert benchmark.matmul_flops(torch.float32, lambda: next(ticks), size=10, times=2) == 2 * 10**3 / 2


def test_the_peak_of_memory_sees_what_was_held_and_let_go():
    before = benchmark.peak_bytes("cpu", reset=True)
    block = torch.ones(64 << 18)  # 64 MiB
    del block
    assert benchmark.peak_bytes("cpu") - before > 60 << 20
