"""The classical step is the same function of the same weights, only slower: else a ratio to it would mean nothing."""

import pytest
import torch
from launch import write_recipe

from hmde_dist.command import InputError
from hmde_dist.engine.padded_step import PaddedModel, pad, padded_contrast
from hmde_dist.model.export import build_model
from hmde_dist.objectives.tile_loss import Hard, tile_loss
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.loader import RankBatches


@pytest.fixture
def opened(shards, tmp_path):
    def open_(*overrides: str):
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("mds")), list(overrides))
        mixture = open_mixture(recipe)
        encoder = build_model(recipe.model, mixture.indexes[0], recipe.data.sentences, 20.0, seed=0)
        hard = recipe.data.hard_negatives == "paper"
        return encoder, RankBatches(mixture, 0, 1, hard)[0]

    return open_


def test_a_rectangle_holds_every_token_in_its_place(opened):
    _, batch = opened()
    (packed,) = batch.chunks
    ids, mask = pad(packed, pad_id=-1)
    assert int(mask.sum()) == packed.tokens < mask.numel()
    assert torch.equal(mask.bool(), ids != -1)
    pieces = packed.ids.split(packed.lower.starts.diff().tolist())
    sentences = iter(packed.sentence_rows.tolist())
    for document, count in enumerate(packed.sentence_counts):
        for place in range(count):
            piece = pieces[next(sentences)]
            assert torch.equal(ids[document, place, : len(piece)], piece)
            assert mask[document, place].sum() == len(piece)
        assert not mask[document, count:].any()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.lower.pooling=mean", "model.upper.pooling=dcls"],
        ["model.lower.pooling=cls", "model.upper.pooling=mean", "model.lower.config.model_type=xlm-roberta"],
        ["data.hard_negatives=paper"],
    ],
)
def test_without_dropout_both_steps_have_one_loss_and_one_gradient(opened, overrides):
    encoder, batch = opened(*overrides)
    sides = 4 if "data.hard_negatives=paper" in overrides else 2
    padded = PaddedModel(encoder).train()
    encoder.train()

    found = padded(batch.chunks[0], sides)
    expected = encoder(batch.chunks[0]).documents
    assert torch.allclose(found, expected, atol=1e-5)
    assert padded.slots > batch.tokens

    # Versions of the anchor's own group are the one thing that the reference does not mask.
    groups = torch.arange(len(found) // sides).repeat(sides)
    if sides == 4:
        groups[len(found) // 2 :] += len(found)
    (x, y, *hard), (pairs, _, *hard_groups) = expected.chunk(sides), groups.chunk(sides)
    hard_x, hard_y = map(Hard, hard, hard_groups) if hard else (None, None)
    loss = tile_loss(x, y, pairs, torch.tensor([20.0]), hard_x=hard_x, hard_y=hard_y).loss
    classical = padded_contrast(found, 20.0, sides)
    assert classical.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    classical.backward()
    for name, parameter in encoder.lower.named_parameters():
        gradient = padded.lower.get_parameter(name).grad
        assert torch.allclose(gradient, parameter.grad, atol=1e-5 * max(1, float(parameter.grad.abs().max()))), name
    for mine, theirs in zip(padded.upper.layers, encoder.upper.layers, strict=True):
        assert torch.allclose(mine.linear1.weight.grad, theirs.feed_forward_in.weight.grad, atol=1e-5)
    assert torch.allclose(padded.dcls.grad, encoder.upper.dcls.grad, atol=1e-5)


def test_rotary_positions_are_refused(opened):
    encoder, _ = opened("model.upper.positions=rotary")
    with pytest.raises(InputError, match=r"model\.upper\.positions=learned"):
        PaddedModel(encoder)
