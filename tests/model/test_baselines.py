"""The paper's baselines are this model with other settings: segments pooled without layers, windows, a flat encoder."""

import numpy as np
import pytest
import torch
from launch import write_recipe
from test_modeling import RAGGED, SPECIAL, build, documents, run
from transformers import AutoModel

from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.model.export import load_model
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import packing_settings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sliding_windows import SlidingWindows, cut

EMPTY = (np.empty(0, np.uint32), np.empty(0, np.int64))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_without_layers_a_document_is_the_mean_or_max_of_its_segments(pooling):
    model = build(upper_layers=0, document_pooling=pooling)
    docs = documents(RAGGED)
    output = run(model, [EMPTY, *docs])
    parts = output.sentences.split([len(lengths) for _, lengths in docs])
    expected = [part.mean(0) if pooling == "mean" else part.amax(0) for part in parts]
    torch.testing.assert_close(output.documents[1:], torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.contextual, output.sentences, rtol=0, atol=0)
    assert not output.documents[0].any()
    assert not list(model.upper.parameters())


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_without_layers_every_parameter_gets_a_gradient(pooling):
    model = build(upper_layers=0, document_pooling=pooling).train()
    batch = pack([EMPTY, *documents(RAGGED)], **SPECIAL, sentences=8)
    model(batch).documents.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # A rank that has nothing to read takes part in the backward pass all the same.
    model.zero_grad()
    model(pack([EMPTY], **SPECIAL, sentences=8)).documents.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_maximum_is_of_all_states_where_there_are_layers():
    model, docs = build(document_pooling="max"), documents(RAGGED)
    output, mean = run(model, docs), run(build(document_pooling="mean"), docs)
    counts = [len(lengths) for _, lengths in docs]
    for row, average, states in zip(output.documents, mean.documents, output.contextual.split(counts), strict=True):
        dcls = average * (len(states) + 1) - states.sum(0)  # the one state that the output does not show
        torch.testing.assert_close(row, torch.cat([states, dcls[None]]).amax(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_window_without_layers_is_the_plain_encoder_on_the_truncated_text(kind, pooling):
    model = build(kind, upper_layers=0, document_pooling="mean", sentence_pooling=pooling, max_sentences=1)
    plain = AutoModel.from_config(model.lower.config, add_pooling_layer=False).eval()
    plain.load_state_dict(model.lower.state_dict())
    whole = documents([[5, 30, 1, 17], [2], [9] * 4, [1, 1, 29, 13]])
    found = run(model, [cut(document, SlidingWindows(40, 40)) for document in whole], sentences=1).documents
    for vector, (ids, _) in zip(found, whole, strict=True):
        with torch.no_grad():
            states = plain(input_ids=torch.tensor([[2, *ids[:40].tolist(), 3]])).last_hidden_state[0]
        expected = states[0] if pooling == "cls" else states.mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        (
            "model.upper={layers: 0, pooling: mean}",
            "data.segments={window: 30, stride: 20}",
            "engine.zero_stage=3",
            "engine.zero3_persistence=0",
        ),
        ("model.upper={layers: 0, pooling: max}", "engine.chunk_tokens=300", "engine.zero_stage=2"),
    ],
)
def test_a_baseline_trains_on_two_ranks_and_its_export_encodes_as_training_did(
    settings, shards, small_corpus, forks, tmp_path
):
    validation = {"validation": str(shards("mds", "validation"))}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), data=validation, run={"steps": 2})
    job = forks.train(2, recipe, "engine.self_test=true", *settings)
    assert job.codes == [0, 0], job.output
    recipe = load_recipe(tmp_path / "run" / "config.yaml")
    index, model = ShardIndex.open(recipe.data.shards), load_model(tmp_path / "run" / "export")
    sample = GroupReader(index)[5]
    texts = [cut(sample.document(number), model.windows) for number in range(len(sample.languages))]
    assert (model.windows is None) == (recipe.data.segments is None)
    with torch.no_grad():
        trained = model(pack(texts, **packing_settings(index, recipe.data.sentences))).documents.numpy()
    by_key = {(d.id, d.lang): d for d in read_documents([small_corpus])}
    originals = [by_key[sample.id, language] for language in sample.languages]
    np.testing.assert_allclose(np.stack(list(encode_documents(model, originals))), trained, rtol=1e-5, atol=1e-5)
    # `.encode` splits a text as training did where it is told the language.
    alone = model.encode(originals[0].text, lang=originals[0].lang)
    np.testing.assert_allclose(alone, trained[0], rtol=1e-5, atol=1e-5)
