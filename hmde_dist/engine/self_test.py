"""The self-test at start: the gradient of one small step, as this run's ranks, ZeRO stage and chunks make it, beside that of a
single process.

Wrong scaling, a reduction that drops a chunk, or a library that changed underneath show up as a norm or a direction that
is off, and Adam would hide them for a month. Every rank encodes three made-up pairs with the real model; the first rank
repeats the whole step on a plain copy of the model, chunk by chunk with the same dropout, its loss over all rows at once.
Refuses to train when they differ. Nothing of it stays: the gradients are dropped like those of a skipped step.
"""

import gc
from dataclasses import replace

import numpy as np
import torch

from hmde_dist.command import RunError
from hmde_dist.engine.deepspeed_engine import TrainedModule
from hmde_dist.engine.gradient_cache import forward_backward
from hmde_dist.engine.training_state import discard_gradients
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.objectives.gather import Ranks
from hmde_dist.recipe import Recipe
from hmde_dist.stream import draws
from hmde_dist.stream.batch import DocumentFacts, PackedBatch, pack, pack_vectors
from hmde_dist.stream.loader import RankBatch
from hmde_dist.topology import World

PAIRS = 3  # of each rank
# Of the norm, and 1 - cosine. The same chunks are computed twice, so bf16 differs by the order of its sums alone.
TOLERANCE = {"fp32": (1e-3, 1e-5), "bf16": (2e-2, 1e-3)}


def self_test(engine, recipe: Recipe, world: World) -> dict[str, float]:
    """Compare the gradients; returns what was measured. A collective.

    Raises:
        RunError: the gradient is not that of a single process.
    """
    engine.train()
    copy = _plain_copy(engine, recipe, world)
    mine = _batch(engine.module.encoder, recipe, world.rank, world.size)
    forward_backward(
        engine,
        mine.to(world.device),
        engine.module.total_loss,
        seed=lambda chunk: _seed(recipe.run.seed, world.rank, chunk),
    )
    if world.is_first:
        _reference_backward(copy, recipe, world)
    reference = {name: p.grad for name, p in copy.named_parameters()} if world.is_first else {}
    sums, scale = np.zeros(3), (1.0, 1.0)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found = _whole_gradient(engine, parameter)
        if world.is_first:
            expected = reference[name]
            expected = torch.zeros_like(found) if expected is None else expected
            found, expected = found.double().flatten(), expected.double().flatten()
            sums += [float(found @ found), float(found @ expected), float(expected @ expected)]
            if name.endswith("log_scale_change"):
                scale = float(found), float(expected)
    discard_gradients(engine)
    del copy, reference
    gc.collect()  # the copy has cycles, and would stay for long
    if world.agree(world.is_first and not sums[2]):
        raise RunError(
            "self-test: the gradient of made-up documents is zero: with these settings the objectives have nothing to learn from"
        )
    measured, problem = {}, ""
    if world.is_first:
        measured = {
            "norm_ratio": float(np.sqrt(sums[0] / sums[2])),
            "cosine": float(sums[1] / np.sqrt(sums[0] * sums[2])),
            "scale_gradient_ratio": scale[0] / scale[1],
        }
        norm, angle = TOLERANCE[recipe.engine.precision]
        # A trained scale's gradient is a small difference of large sums: rounding is measured by the whole gradient.
        scale_is_off = abs(scale[0] - scale[1]) > norm * (abs(scale[1]) + 0.01 * np.sqrt(sums[2]))
        if scale_is_off or not (abs(measured["norm_ratio"] - 1) <= norm and measured["cosine"] > 1 - angle):
            problem = ", ".join(f"{name} {value:.6f}" for name, value in measured.items())
    if world.agree(bool(problem)):
        raise RunError(
            f"self-test: the gradient of {world.size} ranks under ZeRO {recipe.engine.zero_stage} is not that of one process "
            f"({world.messages(problem)[0]}; all should be 1): a library or a setting changes gradients silently. "
            "engine.self_test=false trains all the same"
        )
    return measured


def _plain_copy(engine, recipe: Recipe, world: World) -> TrainedModule | None:
    """The model of the engine, whole and without DeepSpeed, on the first rank."""
    module = engine.module
    copy = None
    if world.is_first:
        encoder = HMDEModel(module.encoder.config)
        copy = TrainedModule(encoder, recipe).to(world.device)
        copy.load_state_dict(dict(module.named_buffers()), strict=False)
        copy.train(module.training)
        into = dict(copy.named_parameters())
    for name, parameter in module.named_parameters():
        with _whole(engine, parameter):
            if world.is_first:
                into[name].data.copy_(parameter.data)
                into[name].requires_grad_(parameter.requires_grad)
    return copy


def _whole(engine, parameter):
    """The context in which a parameter is whole; under ZeRO-3 a collective."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3)


def _whole_gradient(engine, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The reduced gradient of a whole parameter, on every rank. A collective."""
    if engine.zero_optimization_stage() == 0:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(parameter)
    return (
        torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=parameter.device)
        if found is None
        else found
    )


def _batch(encoder: HMDEModel, recipe: Recipe, rank: int, size: int, alone: bool = True) -> RankBatch:
    """Three pairs of made-up documents; the last pair of the last rank is of the first rank's first group."""
    chunks = 2 if recipe.engine.chunk_tokens else 1
    numbers = np.arange(2 * PAIRS * (2 if recipe.data.hard_negatives == "paper" else 1))
    groups = rank * PAIRS + numbers % PAIRS
    groups[2 * PAIRS :] += size * PAIRS
    groups[groups == size * PAIRS - 1] = 0
    chunks_of_numbers = [numbers[numbers % PAIRS % chunks == chunk] for chunk in range(chunks)]  # pairs stay together
    sides = len(numbers) // PAIRS
    # In the reference the pairs of all ranks are one batch.
    place = numbers if alone else numbers // PAIRS * (PAIRS * size) + rank * PAIRS + numbers % PAIRS
    packed = []
    for chosen in chunks_of_numbers:
        chunk = _pack(encoder, rank, chosen)
        sentences = np.array(chunk.sentence_counts)
        languages = numbers[chosen] // PAIRS % 2
        facts = DocumentFacts(place[chosen], groups[chosen], languages, sentences, np.zeros_like(sentences), 0, sides)
        if recipe.teacher_width:
            random = draws.uniform(0, "teacher", rank, chosen[:, None], np.arange(recipe.teacher_width))
            teacher = random.astype(np.float32) - 0.5
            teacher[chosen % 4 == rank % 4] = np.nan  # ranks differ in what is missing
            facts = replace(facts, teacher=teacher)
        packed.append(replace(chunk, facts=facts))
    return RankBatch(packed, 0.0)


def _pack(encoder: HMDEModel, rank: int, numbers: np.ndarray) -> PackedBatch:
    """Documents of two to four sentences of two to six tokens, functions of rank and number; in a pair as many."""
    most = min(4, encoder.config.max_sentences)
    counts = np.minimum(2 + draws.bits(0, "sentences", rank, numbers % PAIRS) % 3, most)
    if not any(p.requires_grad for p in encoder.lower.parameters()):
        width = encoder.config.hidden_size
        bits = [
            draws.uniform(0, "vector", rank, number, np.arange(count * width)).astype(np.float32) - 0.5
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        vectors = [torch.from_numpy(b).bfloat16().view(torch.int16).numpy().reshape(-1, width) for b in bits]
        return pack_vectors(vectors, 0)
    documents, vocabulary = [], encoder.config.lower["vocab_size"]
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        lengths = 2 + draws.bits(0, "tokens", rank, number, np.arange(count)) % 5
        # The upper half of the vocabulary: special tokens lie in the lower one.
        random = draws.bits(0, "token", rank, number, np.arange(int(lengths.sum())))
        tokens = vocabulary - 1 - random % (vocabulary // 2)
        documents.append((tokens.astype(np.uint32), lengths.astype(np.int64)))
    return pack(documents, cls_id=vocabulary - 1, sep_id=vocabulary - 2, sentences=most)


def _seed(seed: int, rank: int, chunk: int) -> int:
    return int(draws.bits(seed, "self-test", rank, chunk)[0] >> np.uint64(1))


def _reference_backward(copy: TrainedModule, recipe: Recipe, world: World) -> None:
    """The gradients of the whole batch, in `copy`."""
    found = []
    for rank in range(world.size):
        batch = _batch(copy.encoder, recipe, rank, world.size, alone=False)
        for number, chunk in enumerate(batch.chunks):
            torch.manual_seed(_seed(recipe.run.seed, rank, number))
            rows, constants = copy(chunk.to(world.device))
            found.append(rows)
    whole = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
    copy.total_loss(whole, constants, Ranks(alone=True))[0].backward()
