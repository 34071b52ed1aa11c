"""Sentences in context: the formula in plain Python, its laws, ranks."""

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

from hmde_dist.objectives.contextual_sentence import contextual_losses

# Documents of a chunk of pairs 0, 1 and 5, sentence by sentence: pair and side.
SENTENCES = [(p, side) for side, counts in ((0, (4, 2, 1)), (1, (4, 3, 1))) for p, n in zip((0, 1, 5), counts, strict=True) for _ in range(n)]  # fmt: skip
PAIRS = list(zip([0, 1, 2, 3, 6], [7, 8, 9, 10, 14], strict=True))  # of aligned sentences


def by_hand(queries, keys, asking, share, scale):
    """Document by document; `asking` are pairs of (query, key)."""
    per_document = {}
    for query, key in asking:
        scores = [scale * float(torch.cosine_similarity(queries[query], one, dim=0)) for one in keys]

        def cross_entropy(candidates, scores=scores, key=key):
            return math.log(sum(math.exp(scores[j]) for j in candidates)) - scores[key]

        inside = [j for j, document in enumerate(SENTENCES) if document == SENTENCES[key]]
        outside = [key] + [j for j, (pair, _) in enumerate(SENTENCES) if pair != SENTENCES[key][0]]
        losses = share * cross_entropy(inside) + (1 - share) * cross_entropy(outside)
        per_document.setdefault(SENTENCES[key], []).append(losses)
    return sum(sum(losses) / len(losses) for losses in per_document.values()) / len(per_document)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("queries", ["own", "aligned"])
def test_the_loss_is_the_formula(queries, share):
    encoder, batch = model().double(), batch_of_pairs([0, 1, 5])
    asking = [(i, i) for i in range(15)] if queries == "own" else PAIRS + [(y, x) for x, y in PAIRS]
    objective = objective_of("contextual_sentence", encoder, queries=queries, share=share, scale=5.0)
    found, output = loss_of(encoder, objective, [batch]), encoder(batch)
    expected = by_hand(output.sentences.detach(), output.contextual.detach(), asking, share, 5.0)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-9)
    parts = share * found.watched["in_document"] + (1 - share) * found.watched["in_batch"]
    torch.testing.assert_close(parts, found.loss.detach())
    assert queries == "own" or found.watched["aligned"] == 5
    torch.testing.assert_close(loss_of(encoder, objective, [swapped(batch)]).loss, found.loss)


def test_padding_changes_nothing_and_a_sentence_alone_costs_nothing():
    torch.manual_seed(0)
    queries, keys = torch.nn.functional.normalize(torch.randn(2, 5, 6, dtype=torch.float64), dim=-1)
    facts = [torch.tensor(fact) for fact in ([0, 0, 1, 2, 3], [0, 1, 0, 0, 0], [7, 7, 8, 7, 9])]
    siblings = torch.tensor([2, 2, 1, 1, 1])
    found = contextual_losses(queries, *facts, siblings, keys, facts, 20.0)
    padded = [torch.cat([fact, torch.tensor([-1, -1])]) for fact in facts]
    again = contextual_losses(queries, *facts, siblings, torch.cat([keys, torch.ones(2, 6)]), padded, 20.0)
    torch.testing.assert_close(again, found)
    assert found[0][2:].tolist() == [0, 0, 0]  # the only sentences of their documents
    encoder = model()
    alone = loss_of(encoder, objective_of("contextual_sentence", encoder), [batch_of_pairs([5])])
    assert alone.loss == 0 and alone.accuracy == 1  # its translation is no negative
    assert_nothing_aligned_is_no_loss(encoder, objective_of("contextual_sentence", encoder, queries="aligned"))


def test_ragged_ranks_are_one_process(forks):
    assert_ranks_are_one_process(forks, "contextual_sentence", {}, {"queries": "aligned", "share": 0.3})


@pytest.mark.parametrize("queries", ["own", "aligned"])
def test_it_learns_and_does_not_collapse(queries):
    encoder, batch = model(), batch_of_pairs([0, 2, 3])
    history = train(encoder, [objective_of("contextual_sentence", encoder, queries=queries)], batch, steps=80)
    (first,), (last,) = history[0], history[-1]
    assert last.loss < 0.5 * first.loss and last.accuracy > 0.8
    output = encoder(batch)
    assert mean_cosine(output.sentences) < 0.8 and mean_cosine(output.contextual) < 0.8
