"""Sentence similarity: the paper's formula in plain Python, its laws, ranks."""

import math

import pytest
import torch
from toy import (
    assert_nothing_aligned_is_no_loss,
    assert_ranks_are_one_process,
    batch_of_pairs,
    loss_of,
    mean_cosine,
    model,
    objective_of,
    swapped,
    train,
)

from hmde_dist.objectives.aligned import aligned_sentences
from hmde_dist.objectives.sentence_similarity import similarity_losses


def probabilities(vectors, i, temperature):
    scores = [float((vectors[i] * other).sum()) for other in vectors]
    if temperature is not None:
        scores = [float(torch.cosine_similarity(vectors[i], other, dim=0)) / temperature for other in vectors]
    largest = max(scores)
    exponents = [math.exp(score - largest) for score in scores]
    return [e / sum(exponents) for e in exponents]


def by_hand(x, y, temperature):
    total = 0.0
    for i in range(len(x)):
        for p, q in zip(probabilities(x, i, temperature), probabilities(y, i, temperature), strict=True):
            total -= math.log(math.cos(math.pi / 2 * (p - q)))
    return total / len(x)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_loss_is_the_formula(temperature):
    # Small vectors, or raw products would give nearly all the probability to the sentence itself.
    encoder, batch = model().double(), batch_of_pairs([0, 1, 2, 5])
    with torch.no_grad():
        encoder.lower.encoder.layer[0].output.LayerNorm.weight *= 0.3
    objective = objective_of("sentence_similarity", encoder, temperature=temperature)
    found, aligned, sentences = loss_of(encoder, objective, [batch]), aligned_sentences(batch), encoder(batch).sentences
    expected = by_hand(sentences[aligned.first].detach(), sentences[aligned.second].detach(), temperature)
    assert expected > 5e-4
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert found.watched["aligned"] == 12
    torch.testing.assert_close(loss_of(encoder, objective, [swapped(batch)]).loss, found.loss)


def test_padding_changes_nothing_equal_languages_cost_nothing_and_neither_does_one_pair():
    x, y = torch.randn(2, 4, 6, dtype=torch.float64)
    own, padding = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    losses, hits = similarity_losses(x, y, own, x, y, padding)
    wider = [torch.cat([side, torch.ones(2, 6)]) for side in (x, y)]
    again = similarity_losses(x, y, own, *wider, torch.tensor([0, 0, 0, 0, 1, 1]).bool())
    torch.testing.assert_close(again, (losses, hits))
    # A rotation, for which no language is to pay: products stay.
    turned = x @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    losses, hits = similarity_losses(x, turned, own, x, turned, padding)
    assert losses.abs().max() < 1e-12 and hits.tolist() == [1, 1, 1, 1]
    encoder = model()
    assert loss_of(encoder, objective_of("sentence_similarity", encoder), [batch_of_pairs([5, 1])]).loss == 0
    assert_nothing_aligned_is_no_loss(encoder, objective_of("sentence_similarity", encoder))


def test_opposite_certainties_stay_finite():
    x = torch.eye(3).mul(30).requires_grad_()
    y = torch.eye(3)[[1, 0, 2]] * 30
    flipped = torch.stack([x[0], x[0], x[2]]), torch.stack([y[0], y[1], y[2]])
    losses, _ = similarity_losses(*flipped, torch.arange(3), x, y, torch.zeros(3, dtype=torch.bool))
    losses.sum().backward()
    assert losses.isfinite().all() and losses.max() > 5 and x.grad.isfinite().all()


def test_ragged_ranks_are_one_process(forks):
    assert_ranks_are_one_process(forks, "sentence_similarity", {}, {"temperature": 0.1})


def test_beside_sentence_alignment_it_learns_and_does_not_collapse():
    encoder, batch = model(), batch_of_pairs([0, 2, 3])
    names = ("sentence_alignment", "sentence_similarity")
    history = train(encoder, [objective_of(name, encoder, temperature=0.1) for name in names], batch)
    first, last = history[0], history[-1]
    assert last[0].loss < 0.3 * first[0].loss and last[1].loss < 0.5 * first[1].loss
    assert mean_cosine(encoder(batch).sentences) < 0.6
