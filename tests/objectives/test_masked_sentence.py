"""Masked sentence prediction: the formula in plain Python, its laws, masks, and ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import assert_ranks_are_one_process, batch_of, mean_cosine, model, objective_of, train
from toy import facts_of as document_facts

from hmde_dist.objectives.masked_sentence import Settings, chosen_sentences, masked_sentence_losses
from hmde_dist.stream.batch import Segments

DOCUMENT = [0] * 4 + [1] * 3 + [2] * 5
PLACE = [*range(4), *range(3), *range(5)]
LANGUAGE = [7] * 7 + [8] * 5
GROUP = [document + 50 for document in DOCUMENT]


def facts_of(rows):
    return [torch.tensor([column[row] for row in rows]) for column in (DOCUMENT, PLACE, LANGUAGE, GROUP)]


def by_hand(q, k, row, bias, temperature, with_bias=True):
    """The formula of the paper for one query, in plain Python."""
    scores = [float(q @ key) / temperature for key in k]
    inside = [j for j in range(len(k)) if DOCUMENT[j] == DOCUMENT[row] and j != row]
    outside = [j for j in range(len(k)) if DOCUMENT[j] != DOCUMENT[row] and LANGUAGE[j] == LANGUAGE[row]]
    b = 0.0
    if outside and with_bias:
        b = bias * (sum(scores[j] for j in inside) / len(inside) - sum(scores[j] for j in outside) / len(outside))
    total = math.exp(scores[row]) + sum(math.exp(scores[j] - b) for j in inside)
    return -math.log(math.exp(scores[row]) / (total + sum(math.exp(scores[j]) for j in outside)))


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_the_loss_is_the_formula(bias):
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1) for _ in range(2))
    settings = Settings(name="masked_sentence", bias=bias, temperature=0.2)
    losses, plain, hits = masked_sentence_losses(q, *facts_of(range(12)), k, facts_of(range(12)), settings)
    assert losses.tolist() == pytest.approx([by_hand(q[i], k, i, bias, 0.2) for i in range(12)], rel=1e-10)
    assert plain.tolist() == pytest.approx(
        [by_hand(q[i], k, i, bias, 0.2, with_bias=False) for i in range(12)], rel=1e-10
    )
    assert (losses.tolist() == plain.tolist()) == (bias == 0.0)
    assert 0 <= float(hits.mean()) < 1


def test_padded_keys_change_nothing_and_the_bias_has_no_gradient():
    torch.manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1).requires_grad_()
    k = torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1)
    settings = Settings(name="masked_sentence", bias=0.7)
    keys = facts_of(range(12))
    losses, *_ = masked_sentence_losses(q, *facts_of(range(12)), k, keys, settings)
    padded = [torch.cat([fact, torch.full((3,), -1)]) for fact in keys]
    again, *_ = masked_sentence_losses(q, *facts_of(range(12)), torch.cat([k, torch.zeros(3, 6)]), padded, settings)
    torch.testing.assert_close(losses, again)
    # Gradient by hand: softmax over biased scores minus one-hot, the bias held fixed.
    (gradient,) = torch.autograd.grad(losses[0], q)
    scores = q[0].detach() @ k.T / 0.1
    b = 0.7 * (scores[1:4].mean() - scores[4:7].mean())
    biased = torch.cat([scores[:1], scores[1:4] - b, scores[4:7]])
    slopes = biased.softmax(0)
    slopes[0] -= 1
    torch.testing.assert_close(gradient[0], slopes @ k[:7] / 0.1)


def test_a_document_that_is_there_twice_is_no_wrong_answer_to_itself():
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1) for _ in range(2))
    settings = Settings(name="masked_sentence")
    twice = facts_of(range(12))
    twice[3][4:7] = twice[3][0]  # the second document is the first one again
    losses, *_ = masked_sentence_losses(q[:4], *(fact[:4] for fact in twice), k, twice, settings)
    alone = [fact[:4] for fact in twice]
    without, *_ = masked_sentence_losses(q[:4], *alone, k[:4], alone, settings)
    torch.testing.assert_close(losses, without)


def test_the_document_encoder_does_not_see_the_sentence_it_predicts():
    """The prediction stays when the hidden sentence changes, moves when another does, and is that of one document by hand."""
    encoder, counts = model(), np.array([4, 2, 7])
    batch = batch_of(counts)
    objective = objective_of("masked_sentence", encoder)
    sentences = encoder(batch).sentences.detach()
    documents, places = np.array([2, 0, 1]), np.array([3, 0, 1])
    found = objective.predictions(encoder, sentences, counts, documents, places)
    hidden = np.array([4 + 2 + 3, 0, 4 + 1])
    changed = sentences.clone()
    changed[hidden] += torch.randn(3, 32)
    torch.testing.assert_close(objective.predictions(encoder, changed, counts, documents, places), found)
    changed = sentences.clone()
    changed[4 + 2 + 5] += torch.randn(32)
    moved = objective.predictions(encoder, changed, counts, documents, places)
    assert not torch.allclose(moved[0], found[0], atol=1e-3)
    torch.testing.assert_close(moved[1:], found[1:])
    # By hand: the third document alone, its fourth sentence replaced.
    upper, rows = encoder.upper, sentences[6:].clone()
    rows[3] = objective.mask
    x = torch.cat([upper.dcls[None], upper.input_norm(rows)]) + upper.positions.weight[:8]
    for layer in upper.layers:
        x = layer(x, torch.arange(8), Segments.of(np.array([8])))
    torch.testing.assert_close(found[0], upper.output_norm(x)[4], rtol=1e-4, atol=1e-5)


def test_short_documents_are_masked_everywhere_and_draws_do_not_depend_on_the_chunk():
    counts = np.array([1, 3, 12, 0, 9])
    facts = document_facts(np.arange(5), np.arange(5) + 100, np.zeros(5, np.int64), counts)
    documents, places = chosen_sentences(counts, facts, 8)
    assert [int((documents == d).sum()) for d in range(5)] == [0, 3, 8, 0, 8]
    assert all(len(set(places[documents == d])) == (documents == d).sum() for d in range(5))
    alone = document_facts(np.array([0]), np.array([102]), np.zeros(1, np.int64), [12])
    assert chosen_sentences(np.array([12]), alone, 8)[1].tolist() == places[documents == 2].tolist()
    later = replace(facts, step=4)
    assert chosen_sentences(counts, later, 8)[1].tolist() != places.tolist()


def test_ragged_ranks_together_are_one_process_with_all_documents(forks):
    assert_ranks_are_one_process(forks, "masked_sentence")


def test_it_learns_and_does_not_collapse():
    """A few documents, trained by themselves: predictions become right while sentence vectors stay apart."""
    encoder, batch = model(), batch_of([5, 6, 7, 4])
    history = train(encoder, [objective_of("masked_sentence", encoder, bias=0.0)], batch)
    (first,), (last,) = history[0], history[-1]
    assert last.loss < 0.5 * first.loss and float(last.accuracy) > 0.8
    assert mean_cosine(encoder(batch).sentences) < 0.95
