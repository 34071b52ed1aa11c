"""What does a training step of a recipe cost, where does its time go, and what do padding, chunks and frozen weights change?

Without options: documents/s, tokens/s, padding, peak memory and arithmetic of the recipe's step on its shards, and the parts
of the step (what each holds: hmde_dist/engine/step_parts.py). Options compare it with another step on the same batches, the
two in turns; a ratio is the median over the rounds, with its range. Batches are read and packed inside the step, by the same
code for all, and are also given without: in training a loader process reads while the step computes.

    --reference padded  the classical step with the same weights: sentence positions in a loop over [documents, 32, 128] full
                        of padding, as HMDE's public code has it (arXiv 2305.07016; see hmde_dist/engine/padded_step.py)
    --cache             the batch in chunks of engine.chunk_tokens against the same batch in one
    --frozen            steps from the vectors of a frozen sentence encoder against steps that train it; vectors are computed
                        for all shards before (beside them, and removed again if they were not there)
    --memory-plot PNG   peak memory of a step for larger and larger batches in chunks of engine.chunk_tokens, each in a
                        process of its own, beside the size of the vectors of all ranks

With --cpu-seconds the clock counts the processor time of the process: on one thread that is the time of an idle machine,
however busy this one is, but for what others take of its caches. Plain python is one rank; torchrun and deepspeed start several. Nothing is saved but the plot.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hmde_dist import topology
from hmde_dist.benchmark import machine, markdown, matmul_flops, peak_bytes
from hmde_dist.command import InputError, argument_parser, output_file, positive, progress, run_command
from hmde_dist.corpus.synthetic import VOCABULARY, synthetic_shards
from hmde_dist.engine.deepspeed_engine import set_learning_rate, start_engine
from hmde_dist.engine.frozen import sentence_vectors, vectors_folder
from hmde_dist.engine.gradient_cache import forward_backward
from hmde_dist.engine.meter import model_flops, peak_flops
from hmde_dist.engine.padded_step import PaddedModel, padded_contrast
from hmde_dist.engine.step_parts import OPTIMIZER, OTHER, PARTS, READ, StepParts, synchronise
from hmde_dist.engine.training_state import gradient_norm
from hmde_dist.model.export import build_model
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import Recipe, load_recipe
from hmde_dist.stream.loader import RankBatch, RankBatches, batches
from hmde_dist.stream.mixture import Mixture
from hmde_dist.train import dropout_seed

MEMORY_STEPS = 2  # the first makes Adam's moments
MEMORY_SIZES = 5  # batches of the plot, each twice as large as the one before


class Turn(NamedTuple):
    """Several steps of one kind, all ranks together; seconds are the slowest rank's."""

    seconds: float
    reading: float  # seconds of them
    documents: float
    tokens: float
    slots: float
    flops: float

    @property
    def documents_per_second(self) -> float:
        return self.documents / self.seconds

    @property
    def computed_per_second(self) -> float:
        """Documents/s without reading."""
        return self.documents / (self.seconds - self.reading)


@dataclass
class Bench:
    """What all kinds of step share."""

    recipe: Recipe
    mixture: Mixture
    world: topology.World

    clock: Callable[[], float] = time.perf_counter

    @property
    def hard(self) -> bool:
        return self.recipe.data.hard_negatives == "paper"

    def encoder(self) -> HMDEModel:
        recipe = self.recipe
        index, settings = self.mixture.indexes[0], self.mixture.settings
        return build_model(recipe.model, index, settings.sentences, recipe.scale, settings.seed, settings.windows)

    def part(self, chunk_tokens: int | None, vectors: Sequence = ()) -> RankBatches:
        return RankBatches(self.mixture, self.world.rank, self.world.size, self.hard, chunk_tokens, vectors)


class PackedStep:
    """The step of `train.py`."""

    def __init__(self, name: str, bench: Bench, engine, part: RankBatches):
        self.name, self.bench, self.engine, self.part = name, bench, engine, part
        self.encoder = engine.module.encoder
        engine.train()

    def train(self, number: int, batch: RankBatch, parts: StepParts | None = None) -> None:
        recipe = self.bench.recipe
        set_learning_rate(self.engine, recipe, number % recipe.run.steps)
        forward_backward(
            self.engine,
            batch,
            self.engine.module.total_loss,
            seed=partial(dropout_seed, recipe.run.seed, number, self.bench.world.rank),
        )
        if parts:
            parts.enter(OPTIMIZER)
        gradient_norm(self.engine)
        self.engine.step()

    def slots(self, batch: RankBatch) -> int:
        return sum(self.encoder.slots(chunk) for chunk in batch.chunks)


class PaddedStep:
    """The classical step, with the weights of `encoder`."""

    def __init__(self, name: str, bench: Bench, encoder: HMDEModel):
        self.name, self.bench, self.part, self.encoder = name, bench, bench.part(None), encoder
        self.model = PaddedModel(encoder, bench.recipe.engine.precision).train()
        self.ranks = torch.nn.parallel.DistributedDataParallel(self.model) if bench.world.size > 1 else self.model
        settings = bench.recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )

    def train(self, number: int, batch: RankBatch) -> None:
        sides = 4 if self.bench.hard else 2
        torch.manual_seed(dropout_seed(self.bench.recipe.run.seed, number, self.bench.world.rank, 0))
        documents = self.ranks(batch.chunks[0], sides)
        padded_contrast(documents, self.bench.recipe.scale, sides).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def slots(self, batch: RankBatch) -> int:
        return self.model.slots


def turn(step: PackedStep | PaddedStep, numbers: Sequence[int], parts: StepParts | None = None) -> Turn:
    """Train on these batches, on all ranks; with `parts`, measure them."""
    world, clock = step.bench.world, step.bench.clock
    counts = np.zeros(4)
    seconds = reading = 0.0
    world.barrier()
    gc.collect()
    for number in numbers:
        began = clock()
        if parts:
            parts.enter(READ)
        batch = step.part[number]
        if isinstance(batch, InputError):
            raise batch
        batch = batch.to(world.device)
        synchronise(world.device)
        reading += clock() - began
        if parts:
            parts.enter(OTHER)
            step.train(number, batch, parts)
            parts.enter(None)
        else:
            step.train(number, batch)
        synchronise(world.device)
        seconds += clock() - began
        counts += batch.documents, batch.tokens, step.slots(batch), model_flops(step.encoder, batch)
    return Turn(world.maximum(seconds), world.maximum(reading), *world.totals(counts.tolist()))


class Pace(NamedTuple):
    rounds: int
    steps: int  # of a turn

    def numbers(self, number: int) -> range:
        """The batches of a round; batch 0 is for warming up."""
        return range(1 + number * self.steps, 1 + (number + 1) * self.steps)


def in_turns(one, other, pace: Pace) -> list[tuple[Turn, Turn]]:
    """Every round the same batches for both; every other round in the opposite order."""
    for step in (one, other):
        turn(step, [0])
    rounds = []
    for number in progress(range(pace.rounds), desc=f"{one.name}, {other.name}", unit="round", disable=not first(one)):
        numbers = pace.numbers(number)
        if number % 2:
            second = turn(other, numbers)
            rounds.append((turn(one, numbers), second))
        else:
            rounds.append((turn(one, numbers), turn(other, numbers)))
    return rounds


def first(step) -> bool:
    return step.bench.world.is_first


def spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def comparison(names: tuple[str, str], rounds: Sequence[tuple[Turn, Turn]]) -> str:
    """Both kinds of step, medians over the rounds, and how many times faster than the second the first is."""
    rows = [("step", "documents/s", "without reading", "tokens/s", "padding")]
    for name, turns in zip(names, zip(*rounds, strict=True), strict=True):
        speeds = [t.documents_per_second for t in turns], [t.computed_per_second for t in turns]
        tokens = statistics.median(t.tokens / t.seconds for t in turns)
        padding = 1 - sum(t.tokens for t in turns) / sum(t.slots for t in turns)
        rows.append(
            (name, *(f"{statistics.median(s):,.1f}" for s in speeds), f"{tokens:,.0f}", f"{100 * padding:.1f} %")
        )
    whole = [one.documents_per_second / other.documents_per_second for one, other in rounds]
    computed = [one.computed_per_second / other.computed_per_second for one, other in rounds]
    return f"{markdown(rows)}\n\n{names[0]} over {names[1]}: {spread(whole)}; without reading {spread(computed)}"


def split(parts: dict[str, float], watched: float, plain: float, steps: int) -> str:
    """The parts of a step; `watched` and `plain` are the seconds of all steps that were measured so, and of as many others."""
    rows = [("part", "ms", "share")]
    rows += [(part, f"{1e3 * parts[part] / steps:.1f}", f"{100 * parts[part] / watched:.1f} %") for part in PARTS]
    total = sum(parts.values())
    rows.append(("sum", f"{1e3 * total / steps:.1f}", f"{100 * total / watched:.1f} %"))
    return f"{markdown(rows)}\n\nas many steps that were not watched: {1e3 * plain / steps:.1f} ms a step"


def measure_step(step: PackedStep, pace: Pace) -> str:
    """What the recipe's step costs, alone in this process."""
    recipe, world = step.bench.recipe, step.bench.world
    turn(step, [0])
    parts, plain, watched = StepParts(step.encoder, step.bench.clock), [], []
    for number in progress(range(pace.rounds), desc=step.name, unit="round", disable=not world.is_first):
        plain.append(turn(step, pace.numbers(number)))
        with parts.watching():
            watched.append(turn(step, pace.numbers(number), parts))
    steps = pace.rounds * pace.steps
    peak = world.maximum(peak_bytes(world.device.type)) / 2**20
    rate = [t.flops / t.seconds for t in plain]
    if world.device.type == "cpu":
        dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
        full, what = (
            matmul_flops(dtype, step.bench.clock) * world.size,
            "of this CPU's matmul speed (measured by each rank)",
        )
    else:
        known = peak_flops(world.device)
        full, what = (known * world.size if known else None), "MFU (bf16 peak of the data sheet)"
    used = f"{spread([100 * r / full for r in rate], '.1f')} % {what}" if full else "no known peak, no MFU"
    tokens, slots = (sum(getattr(t, name) for t in plain) for name in ("tokens", "slots"))
    table = split(parts.seconds, sum(t.seconds for t in watched), sum(t.seconds for t in plain), steps)
    return "\n".join([
        f"documents/s   {spread([t.documents_per_second for t in plain], ',.1f')}, "
        f"without reading {spread([t.computed_per_second for t in plain], ',.1f')}",
        f"tokens/s      {spread([t.tokens / t.seconds for t in plain], ',.0f')}",
        f"padding       {100 * (1 - tokens / slots):.2f} %",
        f"peak memory   {peak:,.0f} MiB of a rank ({'the process' if world.device.type == 'cpu' else 'allocated'})",
        f"arithmetic    {statistics.median(rate) / 1e9:,.1f} GFLOP/s, {used}",
        "", table,
    ])  # fmt: skip


# --- the comparisons


def against_padding(step: PackedStep, pace: Pace) -> str:
    other = PaddedStep("padded reference", step.bench, step.encoder)
    return comparison((step.name, other.name), in_turns(step, other, pace))


def against_one_chunk(step: PackedStep, pace: Pace) -> str:
    bench = step.bench
    chunks = len(step.part[0].chunks)
    chunked = PackedStep(f"{chunks} chunks", bench, step.engine, step.part)
    whole = PackedStep("one chunk", bench, step.engine, bench.part(None))
    rounds = in_turns(whole, chunked, pace)
    return comparison((whole.name, chunked.name), rounds) + " (the overhead of the cache)"


def against_frozen(step: PackedStep, pace: Pace) -> str:
    bench = step.bench
    encoder = bench.encoder()
    with computed_vectors(bench, encoder) as (vectors, seconds):
        engine = start_engine(bench.recipe, encoder, bench.world, frozen=True)
        frozen = PackedStep("frozen", bench, engine, bench.part(bench.recipe.engine.chunk_tokens, vectors))
        rounds = in_turns(frozen, step, pace)
    sentences = sum(int(v.layout.first_row[-1]) for v in vectors)
    once = f"{sentences:,} sentence vectors, computed once: {seconds:.1f} s" if seconds else "the vectors were there"
    return f"{comparison((frozen.name, step.name), rounds)}\n{once}"


@contextlib.contextmanager
def computed_vectors(bench: Bench, encoder: HMDEModel) -> Iterator[tuple[list, float]]:
    """The vectors of all shard sets and the seconds they took; those that were not there before are removed at the end."""
    folders = [vectors_folder(index) for index in bench.mixture.indexes]
    before = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    bench.world.barrier()
    try:
        began = bench.clock()
        vectors = sentence_vectors(bench.recipe, encoder, bench.mixture.indexes, bench.world)
        there = all(v.folder in before for v in vectors)
        yield vectors, 0.0 if there else bench.clock() - began
    finally:
        if bench.world.is_first:
            for folder in folders:
                for path in set(folder.iterdir()) - before if folder.is_dir() else ():
                    shutil.rmtree(path)
                with contextlib.suppress(OSError):  # not empty, or not there
                    folder.rmdir()


# --- memory


def memory_of_step(bench: Bench) -> dict[str, int]:
    """Peak of this process, and the bytes of what grows with the batch: vectors of all ranks, token ids of this one."""
    encoder = bench.encoder()
    step = PackedStep("step", bench, start_engine(bench.recipe, encoder, bench.world), None)
    part = bench.part(bench.recipe.engine.chunk_tokens)
    # Another process reads, as in training: what it holds is not the step's.
    with contextlib.closing(batches(part, range(MEMORY_STEPS), 1, bench.world.device)) as stream:
        for number, batch in enumerate(stream):
            step.train(number, batch)
    ids = sum(t.numel() * t.element_size() for chunk in batch.chunks for t in (chunk.ids, chunk.positions))
    vectors = batch.documents * bench.world.size * encoder.config.hidden_size * 4
    peak = peak_bytes(bench.world.device.type)
    return {"documents": batch.documents, "chunks": len(batch.chunks), "peak": peak, "vectors": vectors, "ids": ids}


def measure_memory(args: argparse.Namespace, bench: Bench) -> list[dict[str, int]]:
    """A row for each size of batch, each from a process of its own."""
    pairs = bench.recipe.data.pairs_per_batch
    most = min(index.groups for index in bench.mixture.indexes)
    sizes = [pairs << doubled for doubled in range(MEMORY_SIZES) if pairs << doubled <= most]
    if len(sizes) < 3:
        raise InputError(
            f"--memory-plot: batches from data.pairs_per_batch={pairs} on must be doubled twice at least, and "
            f"the shards have {most} groups: lower it to {most // 4} or less"
        )
    rows, joined = [], {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    outer = {name: value for name, value in os.environ.items() if name not in joined}
    for size in progress(sizes, desc="memory", unit="batch"):
        command = [sys.executable, __file__, str(args.recipe), *args.overrides, f"data.pairs_per_batch={size}"]
        # Blocks of a MiB go back to the system when they are freed: the peak is what was in use.
        environment = outer | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
        command += ["--memory-step"]
        job = subprocess.run(command, capture_output=True, text=True, env=environment)
        if job.returncode:
            raise RuntimeError(f"{size} pairs: exit code {job.returncode}\n{job.stderr[-4000:]}")
        rows.append(json.loads(job.stdout.splitlines()[-1]))
    if rows[0]["chunks"] < 2:
        raise InputError("--memory-plot: the smallest batch is one chunk; lower engine.chunk_tokens")
    return rows


def memory_table(rows: Sequence[dict[str, int]]) -> str:
    head = ("documents of a batch", "chunks", "peak MiB", "growth MiB", "vectors of all ranks MiB", "token ids MiB")
    body = [
        (
            f"{row['documents']:,}",
            str(row["chunks"]),
            *(
                f"{value / 2**20:,.1f}"
                for value in (row["peak"], row["peak"] - rows[0]["peak"], row["vectors"], row["ids"])
            ),
        )
        for row in rows
    ]
    return markdown([head, *body])


def plot_memory(rows: Sequence[dict[str, int]], out: Path) -> None:
    from matplotlib.figure import Figure

    documents = [row["documents"] for row in rows]
    peak, vectors, ids = (np.array([row[name] for row in rows]) / 2**20 for name in ("peak", "vectors", "ids"))
    figure = Figure(figsize=(6, 3.5), dpi=90, layout="constrained")
    axes = figure.subplots()
    axes.plot(documents, peak, "o-", label="peak of a step")
    axes.plot(
        documents, peak[0] + (vectors + ids) - (vectors + ids)[0], "--", label="smallest peak + vectors + token ids"
    )
    axes.plot(documents, ids, ".:", label="token ids of the batch")
    axes.plot(documents, vectors, ".-", label="document vectors of all ranks")
    axes.set(xlabel="documents of a global batch", ylabel="MiB", ylim=(0, None), xscale="log")
    axes.set_xticks(documents, [f"{count:,}" for count in documents])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    with output_file(out, "wb") as file:
        figure.savefig(file, format="png")


def check(args: argparse.Namespace, recipe: Recipe, world: topology.World) -> None:
    """Refuse what cannot be measured, before anything is started."""
    if recipe.data.pairs_per_batch % world.size:
        raise InputError(f"data.pairs_per_batch={recipe.data.pairs_per_batch} is not divisible by {world.size} ranks")
    if recipe.model.lower.frozen:
        raise InputError("a frozen step is measured beside one that is not: set model.lower.frozen=false, add --frozen")
    if (args.cache or args.memory_plot) and recipe.engine.chunk_tokens is None:
        raise InputError("--cache and --memory-plot measure chunks: set engine.chunk_tokens")
    if world.size > 1 and (args.memory_plot or args.synthetic):
        raise InputError("--memory-plot and --synthetic run on one rank: start with plain python")
    if args.cpu_seconds and (world.device.type == "cuda" or world.size > 1 or torch.get_num_threads() > 1):
        raise InputError(
            "--cpu-seconds would count waiting as work here: use one rank on a CPU, with OMP_NUM_THREADS=1"
        )


def main() -> None:
    parser = argument_parser(
        __doc__, "python tools/bench_train.py recipes/demo.yaml --shards build/demo/shards/train --reference padded"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--shards", metavar="DIR", help="in place of data.shards")
    parser.add_argument(
        "--synthetic", type=positive, metavar="N", help=f"or N pairs of random documents, {VOCABULARY} tokens"
    )
    parser.add_argument("--reference", choices=["padded"], help="beside the classical step")
    parser.add_argument("--cache", action="store_true", help="beside the same batch in one chunk")
    parser.add_argument("--frozen", action="store_true", help="beside steps of a frozen sentence encoder")
    parser.add_argument("--memory-plot", type=Path, metavar="PNG", help="peak memory of larger and larger batches")
    parser.add_argument("--rounds", type=positive, default=3, help="%(default)s")
    parser.add_argument("--steps", type=positive, default=3, help="of a turn (%(default)s)")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="measure processor time, on a machine that others use, too"
    )
    parser.add_argument("--memory-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    args = parser.parse_intermixed_args()
    with contextlib.ExitStack() as stack:
        if args.synthetic:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-train-"))
            args.shards = str(synthetic_shards(args.synthetic, Path(folder)))
        if args.shards:
            args.overrides += [f"data.shards={args.shards}"]
        recipe = load_recipe(args.recipe, args.overrides)
        mixture = open_mixture(recipe)
        world = topology.join(recipe.engine.timeout_minutes)
        stack.callback(topology.leave)
        check(args, recipe, world)
        run(args, Bench(recipe, mixture, world, time.process_time if args.cpu_seconds else time.perf_counter))


def run(args: argparse.Namespace, bench: Bench) -> None:
    if args.memory_step:
        print(json.dumps(memory_of_step(bench)))
        return
    recipe, world, load = bench.recipe, bench.world, os.getloadavg()[0]

    def report(title: str, text: str) -> None:
        if world.is_first:
            print(f"\n{title}\n\n{text}", flush=True)

    if args.memory_plot:
        rows = measure_memory(args, bench)
        plot_memory(rows, args.memory_plot)
        report(f"memory, engine.chunk_tokens={recipe.engine.chunk_tokens}", memory_table(rows))
    else:
        pace = Pace(args.rounds, args.steps)
        engine = start_engine(recipe, bench.encoder(), world)
        step = PackedStep("this project", bench, engine, bench.part(recipe.engine.chunk_tokens))
        report("the step", measure_step(step, pace))
        if args.reference:
            report("beside the padded reference", against_padding(step, pace))
        if args.cache:
            report("the gradient cache", against_one_chunk(step, pace))
        if args.frozen:
            report("the frozen sentence encoder", against_frozen(step, pace))
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    report(
        f"{machine()}; {world.size} ranks on {device}, {torch.get_num_threads()} threads each, {recipe.engine.precision}; "
        f"load {load:.1f} at the start.",
        f"Batches of {recipe.data.pairs_per_batch} pairs; {args.rounds} rounds of {args.steps} steps: median (range) of "
        f"{'processor' if args.cpu_seconds else 'wall'} time.",
    )


if __name__ == "__main__":
    # What is wrong for all ranks the first one says for all.
    run_command(main, patience=3.0 * (topology.claimed_rank() > 0))
