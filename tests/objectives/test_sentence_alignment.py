"""Sentence alignment: the paper's formula in plain Python, its laws, ranks."""

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
from hmde_dist.objectives.sentence_alignment import alignment_losses


def aligned_vectors(encoder, batch):
    aligned, sentences = aligned_sentences(batch), encoder(batch).sentences
    return sentences[aligned.first], sentences[aligned.second]


def by_hand(x, y, temperature):
    """Both directions, one anchor after the other."""
    total = 0.0
    for anchors, keys in ((x, y), (y, x)):
        for i in range(len(x)):
            scores = [float((anchors[i] * key).sum()) for key in keys]
            if temperature is not None:
                norms = [float(anchors[i].norm() * key.norm()) for key in keys]
                scores = [s / n / temperature for s, n in zip(scores, norms, strict=True)]
            total -= math.log(math.exp(scores[i]) / sum(map(math.exp, scores)))
    return total / len(x)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_loss_is_the_formula(temperature):
    encoder, batch = model().double(), batch_of_pairs([0, 1, 2, 5])
    found = loss_of(encoder, objective_of("sentence_alignment", encoder, temperature=temperature), [batch])
    expected = by_hand(*(v.detach() for v in aligned_vectors(encoder, batch)), temperature)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert found.watched["aligned"] == 12 and found.negatives == 11
    both = loss_of(encoder, objective_of("sentence_alignment", encoder, temperature=temperature), [swapped(batch)])
    torch.testing.assert_close(both.loss, found.loss)


def test_one_pair_alone_costs_nothing_and_so_does_none():
    encoder = model()
    found = loss_of(encoder, objective_of("sentence_alignment", encoder), [batch_of_pairs([5, 1])])
    assert found.loss == 0 and found.accuracy == 1 and found.watched["aligned"] == 1
    assert_nothing_aligned_is_no_loss(encoder, objective_of("sentence_alignment", encoder))


def test_padding_and_versions_of_the_same_sentence_are_no_negatives():
    x, y = torch.randn(2, 4, 6, dtype=torch.float64)
    own, groups, places = torch.arange(4), torch.tensor([7, 7, 8, 7]), torch.tensor([0, 1, 0, 0])
    losses, hits = alignment_losses(x, own, groups, places, y, [groups, places])
    padded = [torch.cat([fact, torch.tensor([fill, fill])]) for fact, fill in ((groups, 7), (places, -1))]
    again = alignment_losses(x, own, groups, places, torch.cat([y, 9 * torch.ones(2, 6)]), padded)
    torch.testing.assert_close(again, (losses, hits))
    scores = x @ y.T
    expected = scores[:, :3].logsumexp(1)[:3] - scores.diagonal()[:3]  # the fourth is the first one's sentence
    torch.testing.assert_close(losses[0], expected[0])
    torch.testing.assert_close(losses[1], scores[1].logsumexp(0) - scores[1, 1])
    assert hits.tolist() == [float(scores[i, i] > max(scores[i, j] for j in range(4) if j != i and {i, j} != {0, 3})) for i in range(4)]  # fmt: skip


def test_ragged_ranks_are_one_process(forks):
    assert_ranks_are_one_process(forks, "sentence_alignment", {}, {"temperature": 0.1})


def test_it_learns_and_does_not_collapse():
    encoder, batch = model(), batch_of_pairs([0, 2, 3])
    history = train(encoder, [objective_of("sentence_alignment", encoder, temperature=0.1)], batch)
    (first,), (last,) = history[0], history[-1]
    assert last.loss < 0.3 * first.loss and last.accuracy > 0.9
    x, y = aligned_vectors(encoder, batch)
    assert mean_cosine(x) < 0.6 and torch.cosine_similarity(x, y).mean() > mean_cosine(x) + 0.3
