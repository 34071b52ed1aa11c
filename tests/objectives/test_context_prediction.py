"""Context prediction: the formula in plain Python, what is drawn, the bank, the asymmetric batch norm, ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import (
    SENTENCES,
    assert_ranks_are_one_process,
    batch_of,
    batch_of_pairs,
    loss_of,
    mean_cosine,
    model,
    objective_of,
    train,
)  # fmt: skip

from hmde_dist.objectives.context_prediction import MOMENTUM, drawn_contexts

NAME, LANGUAGES = "context_prediction", ["aa", "bb"]
PAIRS = range(6)


def encoder_of():
    return model(languages=LANGUAGES)


def at_step(batch, step: int):
    return replace(batch, facts=replace(batch.facts, step=step))


def by_hand(encoder, objective, batch, bank=()) -> float:
    """The formula, one anchor after the other; `bank` are (vector, group, language)."""
    settings, facts = objective.settings, batch.facts
    counts = np.array(batch.sentence_counts)
    sentences = encoder(batch).sentences.detach()
    documents, centres, contexts = drawn_contexts(counts, facts, settings.window)
    first = np.cumsum(counts) - counts
    sides = [objective.into(sentences[torch.from_numpy(first[documents] + place)]) for place in (centres, contexts)]
    if settings.norm == "layer":
        normal = [F.layer_norm(side, (32,)) for side in sides]
    else:
        fresh = int(objective.steps) % 2
        batch_norm = F.batch_norm(sides[fresh], None, None, training=True)
        running = F.batch_norm(sides[1 - fresh], objective.mean, objective.variance)
        normal = [batch_norm, running] if fresh == 0 else [running, batch_norm]
    c, s = (F.normalize(objective.out(side * objective.gain + objective.shift), dim=1) for side in normal)
    groups, languages = facts.groups[documents], facts.languages[documents]
    total = 0.0
    for anchors, partners in ((c, s), (s, c)):
        for i in range(len(documents)):
            wrong = [
                partners[j] for j in range(len(documents)) if languages[j] == languages[i] and groups[j] != groups[i]
            ]
            wrong += [vector for vector, group, language in bank if language == languages[i] and group != groups[i]]
            scores = [float(anchors[i] @ other) / settings.temperature for other in (partners[i], *wrong)]
            total += (math.log(sum(map(math.exp, scores))) - scores[0]) / 2
    return total / len(documents)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_loss_is_the_formula_with_and_without_a_bank(norm):
    encoder = encoder_of().double()
    objective = objective_of(NAME, encoder, norm=norm, bank=8).double()
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    kept = []
    for step in (3, 4, 5):
        batch = at_step(batch_of_pairs(PAIRS), step)
        found = loss_of(encoder, objective, [batch])
        assert float(found.loss.detach()) == pytest.approx(by_hand(encoder, objective, batch, kept), rel=1e-9)
        before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
        assert all(torch.equal(buffer, before[name]) for name, buffer in objective.named_buffers())  # nothing yet
        found.commit()
        languages = [(language, place) for language in (0, 1) for place in range(8)]
        kept = [
            (objective.bank[at], int(objective.bank_groups[at]), at[0])
            for at in languages
            if objective.bank_groups[at] >= 0
        ]
        assert len(kept) == min(16, 10 * (step - 2))  # ten of the twelve documents have two sentences


def test_the_bank_is_first_in_first_out_and_does_not_know_in_which_order_rows_came():
    objectives = [objective_of(NAME, encoder_of(), bank=4) for _ in range(2)]
    vectors = torch.randn(6, 32)
    groups, languages = torch.tensor([5, 3, 9, 7, 1, -1]), torch.tensor([0, 0, 0, 1, 0, -1])
    order = torch.tensor([4, 5, 2, 0, 3, 1])
    objectives[0].push(vectors, groups, languages)
    objectives[1].push(vectors[order], groups[order], languages[order])
    for (name, one), (_, other) in zip(*(o.named_buffers() for o in objectives), strict=True):
        assert torch.equal(one, other), name
    assert objectives[0].bank_groups.tolist() == [[1, 3, 5, 9], [7, -1, -1, -1]]
    objectives[0].push(vectors[:2], torch.tensor([11, 12]), torch.tensor([0, 0]))
    assert objectives[0].bank_groups[0].tolist() == [11, 12, 5, 9]


def test_a_document_does_not_meet_itself_in_the_bank_nor_a_version_in_another_language():
    encoder = encoder_of()
    objective = objective_of(NAME, encoder, bank=64)
    alone = batch_of_pairs([0])
    found = loss_of(encoder, objective, [alone])
    assert found.loss == 0 and found.negatives == 0
    found.commit()
    assert loss_of(encoder, objective, [alone]).loss == 0
    assert loss_of(encoder, objective, [batch_of_pairs([2])]).negatives == 1


def test_contexts_are_near_centres_and_drawn_for_the_document_whoever_has_it():
    counts = np.array([*SENTENCES[0] * 50, 1, 0])
    facts = batch_of(counts).facts
    documents, centres, contexts = drawn_contexts(counts, facts, 2)
    assert set(documents.tolist()) == set(np.flatnonzero(counts > 1).tolist())
    assert (centres != contexts).all() and (np.abs(centres - contexts) <= 2).all()
    assert (np.minimum(centres, contexts) >= 0).all() and (np.maximum(centres, contexts) < counts[documents]).all()
    long = counts[documents] == 12
    assert {*(contexts - centres)[long].tolist()} == {-2, -1, 1, 2} and {*centres[long].tolist()} == set(range(12))
    again = drawn_contexts(counts[3:4], batch_of(counts[3:4], [3]).facts, 2)
    assert [int(part[0]) for part in again[1:]] == [int(part[list(documents).index(3)]) for part in (centres, contexts)]


def test_batch_norm_takes_turns_and_its_mean_runs():
    encoder = encoder_of()
    objective = objective_of(NAME, encoder, norm="batch", bank=0)
    batch = batch_of_pairs(PAIRS)
    first = loss_of(encoder, objective, [batch])
    first.commit()
    assert int(objective.steps) == 1
    documents, centres, _ = drawn_contexts(np.array(batch.sentence_counts), batch.facts, 2)
    starts = np.cumsum(batch.sentence_counts) - batch.sentence_counts
    side = objective.into(encoder(batch).sentences[torch.from_numpy(starts[documents] + centres)]).detach()
    torch.testing.assert_close(objective.mean, MOMENTUM * side.mean(0))
    torch.testing.assert_close(objective.variance, 1 + MOMENTUM * (side.var(0, unbiased=False) - 1))
    assert loss_of(encoder, objective, [batch]).loss != first.loss


@pytest.mark.parametrize("settings", [{"bank": 0, "norm": "batch"}, {"bank": 8, "norm": "batch"}, {"bank": 0}])
def test_documents_of_one_sentence_teach_nothing_and_leave_the_state_alone(settings):
    encoder = encoder_of()
    objective = objective_of(NAME, encoder, **settings)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    found = loss_of(encoder, objective, [batch_of([1, 1, 1])])
    found.loss.backward()
    found.commit()
    assert found.loss == 0 and found.accuracy == 0 and found.negatives == 0
    assert all(p.grad is None or not p.grad.any() for p in (*encoder.parameters(), *objective.parameters()))
    torch.testing.assert_close(dict(objective.named_buffers()), before)


def test_ragged_ranks_together_are_one_process_with_all_documents(forks):
    assert_ranks_are_one_process(forks, NAME, {"bank": 4}, {"norm": "batch", "bank": 0})


def test_it_learns_and_does_not_collapse():
    encoder = encoder_of()
    objective = objective_of(NAME, encoder, bank=0)
    batch = batch_of_pairs(PAIRS)
    history = train(encoder, [objective], batch)
    assert history[-1][0].loss < 0.5 * history[0][0].loss and history[-1][0].accuracy > 0.8
    assert mean_cosine(encoder(batch).sentences) < 0.9
