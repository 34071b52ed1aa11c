"""Words of the translation: the formula sentence by sentence, its laws, ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy import (
    SENTENCES,
    assert_nothing_aligned_is_no_loss,
    assert_ranks_are_one_process,
    batch_of_pairs,
    document,
    loss_of,
    mean_cosine,
    model,
    objective_of,
    swapped,
    train,
)

from hmde_dist.command import InputError
from hmde_dist.objectives.aligned import aligned_sentences
from hmde_dist.objectives.translation_tokens import Masked, Settings, Tokens, targets_of
from hmde_dist.stream import draws
from hmde_dist.stream.batch import Segments

NAME = "translation_tokens"
CLS, SEP, MASK = 1, 2, 3


def sentences_of(pair: int, side: int) -> list[list[int]]:
    tokens, lengths = document(1000 * side + pair, SENTENCES[side][pair])
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def vector_of(encoder, sentence):
    ids = torch.tensor([CLS, *sentence, SEP])
    return encoder.encode_tokens(ids, torch.arange(len(ids)), Segments.of(np.array([len(ids)])))[0]


def uniform(tokens):
    return {token: number / len(tokens) for token, number in Counter(tokens).items()}


def divergence(encoder, objective, vector, target, language):
    """KL of the prediction from a target {token: share}, in fp64."""
    if objective.language is not None:
        vector = torch.cat([objective.language.weight[language], vector])
    head, table = objective.head, encoder.lower.embeddings.word_embeddings.weight
    hidden = torch.nn.functional.silu(head.dense(vector))
    hidden = torch.nn.functional.layer_norm(hidden, hidden.shape, head.norm.weight, head.norm.bias)
    likelihoods = (table @ hidden + head.bias).log_softmax(0)
    assert sum(target.values()) == pytest.approx(1)
    return sum(share * (np.log(share) - float(likelihoods[token])) for token, share in target.items())


@pytest.mark.parametrize("settings", [{}, {"language_embedding": 5}, {"masked": False, "language_embedding": 5}])
@torch.no_grad()
def test_the_loss_is_the_formula(settings):
    encoder, pairs = model().double(), [0, 1, 2, 5]
    objective = objective_of(NAME, encoder, **settings).double()
    torch.nn.init.normal_(objective.head.bias)
    total, number = 0.0, 0
    for pair in (0, 2, 5):
        for place, both in enumerate(zip(sentences_of(pair, 0), sentences_of(pair, 1), strict=True)):
            targets, read = [uniform(both[1]), uniform(both[0])], list(both)
            if objective.settings.masked:
                key = 3, 100 + pair, place
                side = int(draws.bits(0, "masked side", *key)[0] % np.uint64(2))
                at = int(draws.bits(0, "masked word", *key)[0] % np.uint64(len(both[side])))
                read[side] = [*both[side][:at], MASK, *both[side][at + 1 :]]
                targets[side] = {token: share / 2 for token, share in targets[side].items()}
                targets[side][both[side][at]] = targets[side].get(both[side][at], 0) + 0.5
            for side in (0, 1):
                vector = vector_of(encoder, read[side])
                total += divergence(encoder, objective, vector, targets[side], language=1 - side)
            number += 1
    found = loss_of(encoder, objective, [batch_of_pairs(pairs)])
    assert float(found.loss) == pytest.approx(total / number, rel=1e-6)
    assert found.watched["aligned"] == number == 12
    if not objective.settings.masked:  # else the side that is masked is another one
        exchanged = loss_of(encoder, objective, [swapped(batch_of_pairs(pairs))])
        torch.testing.assert_close(exchanged.loss, found.loss)


@torch.no_grad()
def test_a_document_predicts_the_tokens_of_its_version():
    encoder, pairs = model().double(), [0, 1, 5]
    objective = objective_of(NAME, encoder, level="document", masked=False, language_embedding=5).double()
    batch, total = batch_of_pairs(pairs), 0.0
    vectors = encoder(batch).documents.view(2, 3, -1)
    for number, pair in enumerate(pairs):
        for side in (0, 1):
            bag = uniform(sum(sentences_of(pair, 1 - side), []))  # noqa: RUF017
            total += divergence(encoder, objective, vectors[side, number], bag, language=1 - side)
    found = loss_of(encoder, objective, [batch])
    assert float(found.loss) == pytest.approx(total / 3, rel=1e-6)
    assert found.watched["pairs"] == 3
    torch.testing.assert_close(loss_of(encoder, objective, [swapped(batch)]).loss, found.loss)
    empty = batch_of_pairs([0, 1], sentences=((4, 2), (4, 0)))  # its second pair has nothing to predict
    alone = loss_of(encoder, objective, [batch_of_pairs([0])])
    torch.testing.assert_close(loss_of(encoder, objective, [empty]).loss, alone.loss)


def test_repeated_tokens_add_up():
    batch = batch_of_pairs([5])
    ids = batch.ids.clone()
    tokens = Tokens(batch)
    _, places = tokens.of_sentences(np.array([1]))
    ids[torch.from_numpy(places)] = torch.tensor([8, 9, 8, 8, 9, 8, 8, 9])[: len(places)]
    batch = replace(batch, ids=ids)
    masked = Masked(torch.tensor([0]), torch.zeros(1, 32), torch.tensor([9]))
    targets = targets_of(batch, tokens, np.array([0]), np.array([1]), masked, 1)
    shares = dict(zip(targets.tokens.tolist(), targets.shares.tolist(), strict=True))
    nines = ids[torch.from_numpy(places)].tolist().count(9) / len(places)
    assert shares == pytest.approx({8: 0.5 * (1 - nines), 9: 0.5 * nines + 0.5}) and len(places) > 2


def test_what_is_masked_does_not_depend_on_the_chunk():
    encoder = model()
    objective = objective_of(NAME, encoder)
    whole = loss_of(encoder, objective, [batch_of_pairs([0, 2, 5])])
    parts = [batch_of_pairs([pair], [place], 3) for place, pair in enumerate((0, 2, 5))]
    torch.testing.assert_close(loss_of(encoder, objective, parts).loss, whole.loss)


def test_nothing_aligned_is_no_loss():
    encoder = model()
    assert_nothing_aligned_is_no_loss(encoder, objective_of(NAME, encoder))
    assert_nothing_aligned_is_no_loss(encoder, objective_of(NAME, encoder, masked=False))


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(InputError, match="mask token"):
        objective_of(NAME, model(mask_token_id=None))
    objective_of(NAME, model(mask_token_id=None), masked=False)
    with pytest.raises(ValidationError, match="masked: false"):
        Settings(name=NAME, level="document")


def test_ragged_ranks_are_one_process(forks):
    xtr, document_level = {"masked": False, "language_embedding": 8}, {"masked": False, "level": "document"}
    assert_ranks_are_one_process(forks, NAME, {}, xtr, document_level)


@pytest.mark.parametrize("settings", [{}, {"level": "document", "masked": False}])
def test_it_learns_and_does_not_collapse(settings):
    encoder, batch = model(), batch_of_pairs([0, 2, 3])
    history = train(encoder, [objective_of(NAME, encoder, **settings)], batch)
    (first,), (last,) = history[0], history[-1]
    assert last.loss < 0.6 * first.loss and last.accuracy > first.accuracy + 0.3
    output, aligned = encoder(batch), aligned_sentences(batch)
    if settings:
        assert mean_cosine(output.documents) < 0.8
    else:
        assert mean_cosine(output.sentences[aligned.first]) < 0.8
