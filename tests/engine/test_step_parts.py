"""The parts of a step: none is lost, and each holds what its name says."""

import itertools

import torch
from launch import write_recipe

from hmde_dist.engine.step_parts import (
    LOWER_BACKWARD,
    LOWER_FORWARD,
    OPTIMIZER,
    OTHER,
    PARTS,
    READ,
    UPPER,
    StepParts,
)
from hmde_dist.model.export import build_model
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.loader import RankBatches


def test_the_parts_of_a_step_in_chunks_follow_each_other_and_add_up(shards, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("mds")))
    mixture = open_mixture(recipe)
    encoder = build_model(recipe.model, mixture.indexes[0], recipe.data.sentences, 20.0, seed=0)
    batch = RankBatches(mixture, 0, 1, chunk_tokens=400)[0]
    assert len(batch.chunks) > 1
    ticks = itertools.count()
    parts = StepParts(encoder, lambda: next(ticks))
    entered = []
    enter = parts.enter

    def noted(part: str | None) -> None:
        entered.append(part)
        enter(part)

    parts.enter = noted
    with parts.watching():
        parts.enter(READ)
        parts.enter(OTHER)
        with torch.no_grad():
            encoder(batch.chunks[0])
        for chunk in batch.chunks:
            encoder(chunk).documents.sum().backward()
        parts.enter(OPTIMIZER)
        parts.enter(None)
    assert entered == [
        *(READ, OTHER, LOWER_FORWARD, UPPER),
        *(LOWER_FORWARD, UPPER, LOWER_BACKWARD) * len(batch.chunks),
        *(OPTIMIZER, None),
    ]
    # One tick a change: every part has lasted as many ticks as it was entered, and all together all of them.
    assert parts.seconds == {part: entered.count(part) for part in PARTS}
    assert sum(parts.seconds.values()) == len(entered) - 1
    assert "encode_sentences" not in vars(encoder)


def test_vectors_that_are_known_have_no_backward_part(shards, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("mds")))
    mixture = open_mixture(recipe)
    encoder = build_model(recipe.model, mixture.indexes[0], recipe.data.sentences, 20.0, seed=0)
    encoder.lower.requires_grad_(False)
    parts = StepParts(encoder)
    with parts.watching():
        encoder(RankBatches(mixture, 0, 1)[0].chunks[0]).documents.sum().backward()
        parts.enter(None)
    assert parts.seconds[LOWER_BACKWARD] == 0 < parts.seconds[UPPER]
