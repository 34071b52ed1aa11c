"""Masked tokens: the formula in plain Python, what is masked, LangSAMP's embeddings, ranks and stages."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import assert_ranks_are_one_process, batch_of, batch_of_pairs, loss_of, mean_cosine, model, train

from hmde_dist.command import InputError
from hmde_dist.model.packed_attention import encode_stream
from hmde_dist.objectives.masked_token import Objective, Settings, read_again, script_of
from hmde_dist.stream.batch import Segments

MASK = 3


def encoder_with(languages=("de", "ja")):
    encoder = model()
    encoder.config.mask_token_id, encoder.config.languages = MASK, list(languages)
    return encoder


def objective_of(encoder, **settings):
    torch.manual_seed(7)
    objective = Objective(Settings(name="masked_token", **settings), encoder)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective


@pytest.mark.parametrize("language_embeddings", [False, True])
def test_the_loss_is_the_formula(language_embeddings):
    encoder = encoder_with().double()
    objective = objective_of(encoder, share=0.4, language_embeddings=language_embeddings).double()
    batch = batch_of(np.array([4, 2, 7]))
    again = read_again(batch, objective.settings, MASK, 100)
    found = loss_of(encoder, objective, [batch])
    # By hand: every sentence alone through Hugging Face's own forward, one prediction after the other.
    ids = batch.ids[torch.from_numpy(again.places)].clone()
    targets = ids[torch.from_numpy(again.masked)].tolist()
    for place, shown in zip(again.masked.tolist(), again.shown.tolist(), strict=True):
        ids[place] = ids[place] if shown < 0 else shown
    states, start = [], 0
    for size in again.sizes.tolist():
        one = ids[start : start + size]
        states.append(
            encode_stream(encoder.lower, encoder.stream, one, torch.arange(size), Segments.of(np.array([size])))
        )
        start += size
    states, head, total = torch.cat(states), objective.head, 0.0
    table = encoder.lower.embeddings.word_embeddings.weight
    for place, target, language in zip(again.masked.tolist(), targets, again.languages.tolist(), strict=True):
        o = states[place]
        if language_embeddings:
            o = o + objective.language[language] + objective.script[[1, 0][language]]  # Jpan before Latn
        x = torch.nn.functional.layer_norm(
            torch.nn.functional.gelu(head.dense(o)), (32,), head.norm.weight, head.norm.bias
        )
        scores = [float(x @ table[v] + head.bias[v]) for v in range(100)]
        total += math.log(sum(map(math.exp, scores))) - scores[target]
    assert len(targets) > 10
    assert float(found.loss) == pytest.approx(total / len(targets), rel=1e-5)  # the head computes in fp32


def test_language_embeddings_begin_as_nothing():
    encoder, batch = encoder_with(), batch_of(np.array([4, 2, 7]))
    torch.manual_seed(1)
    plain = Objective(Settings(name="masked_token"), encoder)
    torch.manual_seed(1)
    both = Objective(Settings(name="masked_token", language_embeddings=True), encoder)
    assert torch.equal(*(loss_of(encoder, one, [batch]).loss for one in (plain, both)))
    assert [script_of(name) for name in ("de", "ja", "sr-latn", "zh-tw", "zh-cn", "simple")] == [
        "Latn", "Jpan", "Latn", "Hant", "Hans", "",
    ]  # fmt: skip


def test_masks_are_as_frequent_as_said_and_fall_on_content_only():
    batch = batch_of(np.full(60, 18))
    settings = Settings(name="masked_token", share=0.3)
    again = read_again(batch, settings, MASK, 100)
    ids = batch.ids[torch.from_numpy(again.places)]
    assert torch.equal(ids, batch.ids) and again.sizes.sum() == len(ids)
    assert not set(ids[torch.from_numpy(again.masked)].tolist()) & {1, 2}  # [CLS] and [SEP]
    content = int((ids > 2).sum())
    assert len(again.masked) / content == pytest.approx(0.3, abs=0.03)
    shares = [(again.shown == MASK).mean(), (again.shown < 0).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.04)
    half = read_again(batch, settings.model_copy(update={"sentences": 0.5}), MASK, 100)
    assert len(half.sizes) / len(again.sizes) == pytest.approx(0.5, abs=0.06)
    later = dataclasses.replace(batch, facts=dataclasses.replace(batch.facts, step=4))
    other = read_again(later, settings, MASK, 100)
    assert set(other.masked.tolist()) != set(again.masked.tolist())


def test_a_chunk_without_sentences_has_nothing_to_predict():
    encoder = encoder_with()
    found = loss_of(encoder, objective_of(encoder), [batch_of(np.array([0]))])
    assert found.loss == 0
    found.loss.backward()


def test_a_tokenizer_without_a_mask_is_refused():
    encoder = model(mask_token_id=None)
    with pytest.raises(InputError, match="mask token"):
        Objective(Settings(name="masked_token"), encoder)


def test_ragged_ranks_together_are_one_process_with_all_documents(forks):
    assert_ranks_are_one_process(forks, "masked_token", {"language_embeddings": True}, {"sentences": 0.5})


def test_it_learns_and_does_not_collapse():
    encoder = encoder_with(("aa", "bb"))
    torch.manual_seed(0)
    objective = Objective(Settings(name="masked_token", share=0.5), encoder)
    batch = batch_of_pairs(range(6))
    history = train(encoder, [objective], batch)
    assert history[-1][0].loss < 0.5 * history[0][0].loss and history[-1][0].accuracy > 0.7
    assert mean_cosine(encoder(batch).sentences) < 0.9
