"""Before anything is spent: what a recipe names is opened, and what cannot work is refused.

Owns what `train.py` asks of data and folders, and `--plan`. Reads indexes and configurations only, so it runs on a login node.
"""

import os
from pathlib import Path

import numpy as np
import torch

from hmde_dist.benchmark import peak_bytes
from hmde_dist.command import InputError
from hmde_dist.engine import forecast
from hmde_dist.engine.deepspeed_engine import TrainedModule
from hmde_dist.engine.memory import STARTED, memory_of
from hmde_dist.engine.meter import PEAK_FLOPS
from hmde_dist.model.export import build_model
from hmde_dist.recipe import Recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.mixture import LanguagePairs, Mixture, Source
from hmde_dist.stream.plan import PlanSettings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sliding_windows import SlidingWindows
from hmde_dist.stream.teacher import Teacher

GIB = 2**30
TRIED_GROUPS = 16  # of each source, of which a teacher must know a document


def check_world(recipe: Recipe, size: int) -> None:
    """Refuse a number of ranks that does not divide the batch."""
    pairs = recipe.data.pairs_per_batch
    if pairs % size:
        divisors = [n for n in range(1, pairs + 1) if pairs % n == 0]
        raise InputError(
            f"data.pairs_per_batch={pairs} is not divisible by {size} ranks: use {', '.join(map(str, divisors))} ranks, or "
            f"a multiple of {size} pairs"
        )


def open_shards(recipe: Recipe, source: str) -> ShardIndex:
    limit = recipe.data.cache_limit_gib
    return ShardIndex.open(source, recipe.data.cache, int(limit * 2**30) if limit else None)


def open_mixture(recipe: Recipe) -> Mixture:
    """The global batches that a recipe asks for."""
    data = recipe.data
    sources = []
    for source in data.sources:
        weights = source.weight if isinstance(source.weight, dict) else {0: source.weight}
        sources.append(Source(open_shards(recipe, source.shards), tuple(sorted(weights.items()))))
        check_alike(sources[-1].index, sources[0].index)
    settings = PlanSettings(
        data.pairs_per_batch,
        data.neighbours_per_batch,
        data.neighbour_group,
        data.language_temperature,
        data.sentences,
        data.window,
        recipe.run.seed,
        SlidingWindows(data.segments.window, data.segments.stride) if data.segments else None,
        data.pairs_per_group,
    )
    return Mixture(sources, settings, data.batch_languages == "one_pair")


def check_alike(one: ShardIndex, other: ShardIndex) -> None:
    """Refuse shard sets that one model could not read, before anything is spent."""
    for name in ("tokenizer", "vocabulary", "special_ids", "sentence_tokens"):
        if one.manifest[name] != other.manifest[name]:
            raise InputError(
                f"{one.folder} and {other.folder} differ in {name}: build both with the same --tokenizer and "
                "--sentence-tokens"
            )


def check_validation(validation: ShardIndex, training: ShardIndex) -> None:
    check_alike(validation, training)
    if not (np.diff(validation.columns["group_documents"].astype(np.int64)) > 1).any():
        raise InputError(f"{validation.folder}: no group has two languages, so there is nothing to retrieve")


def open_teacher(recipe: Recipe, mixture: Mixture) -> Teacher | None:
    """The teacher of a recipe that has one; refuses one of another width, or that does not know the data."""
    if recipe.data.teacher is None:
        return None
    teacher = Teacher(recipe.data.teacher)
    for number, one in enumerate(recipe.objectives):
        if one.needs_teacher and one.width != teacher.width:
            raise InputError(
                f"objectives.{number}.width={one.width}: the vectors in {recipe.data.teacher} have {teacher.width} components"
            )
    tried = 0
    for index in mixture.indexes:
        reader = GroupReader(index)
        for sample in map(reader.__getitem__, range(min(index.groups, TRIED_GROUPS))):
            ids = [sample.id] * len(sample.languages)
            if not np.isnan(teacher.vectors(ids, sample.languages)).all():
                return teacher
            tried += len(ids)
    raise InputError(
        f"data.teacher={recipe.data.teacher}: no vector of any of {tried} documents of the shards that were looked up; encode the "
        "documents that the shards were built from"
    )


def check_writable(folder: Path) -> None:
    """Refuse a run folder that cannot be made, on every rank alike."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"run.folder={folder}: {existing} is no folder that can be written to")


def print_plan(recipe: Recipe, world: int = 1, gpu: str = "H100") -> None:
    """What a run would do and need, from the recipe and the index of its shards alone; see `engine.forecast`.

    Args:
        world: ranks.
        gpu: a name of `meter.PEAK_FLOPS`, for times.
    """
    check_world(recipe, world)
    if gpu not in PEAK_FLOPS:
        raise InputError(f"--gpu {gpu}: no peak is known of it; there are {', '.join(PEAK_FLOPS)}")
    mixture = open_mixture(recipe)
    settings, part = mixture.settings, mixture.parts[0]
    with torch.device("meta"):
        encoder = build_model(
            recipe.model, mixture.indexes[0], settings.sentences, recipe.scale, settings.seed, settings.windows
        )
        module = TrainedModule(encoder, recipe)
    encoder.lower.requires_grad_(not recipe.model.lower.frozen or recipe.model.lower.unfreeze_at_step is not None)
    pairs, steps = settings.pairs, recipe.run.steps
    lower, upper = (sum(p.numel() for p in part.parameters()) for part in (encoder.lower, encoder.upper))
    for index in mixture.indexes:
        print(
            f"data        {index.groups:,} groups, {index.manifest['documents']:,} documents, {len(index.languages)} languages; "
            f"{len(index.manifest['shards'])} shards for {world * max(1, recipe.data.workers)} loader processes"
        )
    print(f"model       {lower:,} parameters in the sentence encoder, {upper:,} in the document encoder")
    documents = 2 * pairs * (1 + (recipe.data.hard_negatives == "paper"))
    print(
        f"batch       {pairs} pairs, {documents} documents; {settings.neighbour_groups * settings.pairs_per_group} of the pairs "
        "category neighbours at most"
    )
    if isinstance(part, LanguagePairs):
        print(f"            of one of {len(part.pairs)} language pairs; {part.left_out} have too few groups")
    print(
        f"run         {steps:,} steps = {steps / part.batches_per_epoch:.1f} epochs of {part.batches_per_epoch:,} batches"
        + (" of the first source, were it alone" if len(mixture.parts) > 1 else "")
    )
    unfrozen = recipe.model.lower.unfreeze_at_step
    if recipe.model.lower.frozen:
        until = f"until step {unfrozen:,}" if unfrozen and unfrozen < steps else "to the end"
        print(f"            the sentence encoder is frozen {until}")
    print(f"worlds      {', '.join(str(n) for n in range(1, pairs + 1) if pairs % n == 0)} ranks")
    model = forecast.model_of(module)
    batch = forecast.batch_of(mixture, documents, recipe.engine.chunk_tokens)
    print_memory(recipe, model, batch, world, gpu)
    time = forecast.step_time(model, batch, world, recipe.engine.zero_stage, gpu)
    sent = sum(forecast.communicated_bytes(model, batch, world, recipe.engine.zero_stage).values())
    print(
        f"step        {forecast.step_flops(model, batch) / 1e12:,.2f} TFLOP, {sent / GIB:.2f} GiB sent by a rank; "
        f"on {world} {gpu}: {time.compute:.3f} s computing, {time.communication:.3f} s communicating, "
        f"MFU {forecast.mfu(model, batch, world, gpu, time.seconds):.0%} at {forecast.EFFICIENCY:.0%} of the peak while computing"
    )
    print(f"estimate    {steps * time.seconds / 3600:,.2f} hours, {documents / time.seconds:,.0f} documents/s")
    size = forecast.checkpoint_bytes(model)
    print(
        f"checkpoint  {size / GIB:.2f} GiB; {size / world / forecast.DISK:.0f} s beside the training at "
        f"{forecast.DISK / 1e9:.0f} GB/s a rank"
    )


def print_memory(recipe: Recipe, model: forecast.Model, batch: forecast.Batch, world: int, gpu: str) -> None:
    """What the first of `world` ranks needs at its peak, under each ZeRO stage, and what it is for under the recipe's."""
    engine = recipe.engine
    imported = peak_bytes("cpu")  # this process has imported what a rank does, and holds no model
    on_gpu = 2 if engine.precision == "bf16" else 4
    plans = [
        [memory_of(model, batch, world, stage, bytes_each, engine.self_test) for bytes_each in (4, on_gpu)]
        for stage in range(4)
    ]
    for stage, (cpu, card) in enumerate(plans):
        print(
            f"{'' if stage else 'memory':<11} ZeRO {stage}: {cpu.process(imported) / GIB:.2f} GiB of the first rank on a CPU; "
            f"on a GPU {card.device / GIB:.2f} of {forecast.GPU_BYTES[gpu] / GIB:.0f}, {card.host / GIB:.2f} of the host"
            + (" <- engine.zero_stage" if stage == engine.zero_stage else "")
        )
    cpu, _ = plans[engine.zero_stage]
    parts = {"process": imported + STARTED, **cpu.peak}
    parts["kept by the allocator"] = cpu.process(imported) - sum(parts.values())
    told = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items())
    print(f"            on a CPU, fullest in its {cpu.fullest}: {told}")
    print("            GPUs were not measured; loader processes and batches that wait for their turn come on top")
