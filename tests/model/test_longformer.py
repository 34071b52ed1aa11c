"""A Longformer made of an encoder with full attention: it is that encoder where its window covers the text."""

import json
import textwrap

import numpy as np
import pytest
import torch
from launch import PROGRAMS, environment, finish, journal, start, write_recipe
from test_export import LOAD
from test_modeling import RAGGED, SPECIAL, build, documents, run
from transformers import AutoConfig, AutoModel

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.engine.deepspeed_engine import start_engine
from hmde_dist.engine.padded_step import PaddedModel
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import build_model, load_model, untrained_model
from hmde_dist.model.longformer import longformer_config
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import RankBatches

KINDS = {"bert": 0, "roberta": 1, "xlm-roberta": 1}


def source_of(kind: str, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.2,
        pad_token_id=KINDS[kind],
        layer_norm_eps=1e-6,
    )
    return AutoModel.from_config(config).eval()


def longformer_of(source, attention_window=64, positions=100, **settings) -> HMDEModel:
    lower = longformer_config(source.config, attention_window, positions)
    config = HMDEConfig(
        lower=lower.to_dict(), hidden_size=32, upper_layers=0, document_pooling="mean", max_sentences=8, **settings
    )
    return untrained_model(config, 0, source).eval()


def states_of(source, ids) -> torch.Tensor:
    with torch.no_grad():
        return source(input_ids=torch.tensor([[2, *ids.tolist(), 3]])).last_hidden_state[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_its_states_are_those_of_its_source_where_the_window_covers_the_text(kind, pooling):
    source = source_of(kind)
    model = longformer_of(source, sentence_pooling=pooling)
    docs = documents(RAGGED)
    found = run(model, docs).sentences
    texts = [text for ids, lengths in docs for text in np.split(ids, np.cumsum(lengths)[:-1])]
    for vector, ids in zip(found, texts, strict=True):
        states = states_of(source, ids)
        expected = states[0] if pooling == "cls" else states.mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_repeat_those_of_the_source(kind):
    source, first = source_of(kind), KINDS[kind] + 1
    known = source.embeddings.position_embeddings.weight[0 if kind == "bert" else first :]
    table = longformer_of(source).lower.embeddings.position_embeddings.weight
    assert len(table) == 100 + first and not table[:first].any()
    for place, row in enumerate(table[first:]):
        assert torch.equal(row, known[place % len(known)])


def test_the_first_token_sees_all_the_others_and_they_see_it():
    model = longformer_of(source_of("xlm-roberta", layers=1), attention_window=4, sentence_pooling="cls")
    (ids, lengths), *_ = documents([[60]])
    changed = ids.copy()
    changed[50] = (changed[50] - 5 + 1) % 95 + 5
    first, second = run(model, [(ids, lengths), (changed, lengths)]).documents
    assert (first - second).abs().max() > 1e-3
    # Without global attention the token, 50 behind the first, would be out of its sight.
    with torch.no_grad():
        states = [
            model.lower(input_ids=torch.tensor([[2, *row.tolist(), 3, 1, 1]])).last_hidden_state[0]
            for row in (ids, changed)
        ]
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=1e-6)


def test_a_document_has_the_same_vector_alone_and_beside_a_much_longer_one():
    model = longformer_of(source_of("xlm-roberta"), attention_window=8, sentence_pooling="mean")
    docs = documents([[4, 7], [90] * 2, [11]])
    together = run(model, docs).documents
    alone = torch.cat([run(model, [document]).documents for document in docs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_parameter_gets_a_gradient_and_padding_is_counted(pooling):
    model = longformer_of(source_of("xlm-roberta"), attention_window=8, sentence_pooling=pooling).train()
    batch = pack(documents(RAGGED), **SPECIAL, sentences=8)
    model(batch).documents.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    # The longest of the 21 sentences has 30 tokens and two special ones.
    assert model.slots(batch) == 21 * 32 > batch.tokens == batch.slots
    assert model.slots(pack(documents([[31]]), **SPECIAL, sentences=8)) == 40
    assert build().slots(batch) == batch.tokens


def test_bf16_is_near():
    model, docs = longformer_of(source_of("xlm-roberta"), attention_window=8), documents(RAGGED)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, docs).documents.float()
    torch.testing.assert_close(found, run(model, docs).documents, rtol=0.1, atol=0.1)


@pytest.fixture(scope="module")
def trained(shards, forks, tmp_path_factory):
    """A run of two steps on two ranks under ZeRO-3, from the weights of an XLM-R."""
    folder = tmp_path_factory.mktemp("longformer")
    index = ShardIndex.open(shards("mds"))
    special = index.manifest["special_ids"]
    config = AutoConfig.for_model(
        "xlm-roberta",
        vocab_size=index.manifest["vocabulary"],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=60,
        initializer_range=0.2,
        pad_token_id=special["pad"],
    )
    torch.manual_seed(1)
    AutoModel.from_config(config).save_pretrained(folder / "source")
    recipe = write_recipe(
        folder / "recipe.yaml",
        shards("mds"),
        data={"sentences": 1, "segments": {"window": 198, "stride": 198}},
        model={
            "lower": {
                "pretrained": str(folder / "source"),
                "longformer": {"attention_window": 16, "positions": 200},
            },
            "upper": {"layers": 0, "pooling": "mean"},
        },
        engine={"zero_stage": 3, "zero3_persistence": 0, "chunk_tokens": 1000, "activation_checkpointing": True},
        run={"steps": 2},
    )
    job = forks.train(2, recipe, "engine.self_test=true")
    assert job.codes == [0, 0], job.output
    return folder / "run"


def test_it_trains_from_the_weights_of_its_source_and_the_journal_tells_its_padding(trained):
    recipe = load_recipe(trained / "config.yaml")
    mixture, model = open_mixture(recipe), load_model(trained / "export")
    fresh = untrained_model(model.config, seed=0)
    source = AutoModel.from_pretrained(recipe.model.lower.pretrained)
    local = source.encoder.layer[1].attention.self.value.weight
    assert torch.equal(fresh.lower.encoder.layer[1].attention.self.value_global.weight, local)
    moved = {n for n, p in fresh.state_dict().items() if not torch.equal(p, model.state_dict()[n])}
    assert {f"lower.encoder.layer.0.attention.self.{n}_global.weight" for n in ("query", "key", "value")} <= moved
    for step, record in enumerate(journal(trained)):
        chunks = [
            chunk
            for rank in (0, 1)
            for chunk in RankBatches(mixture, rank, 2, chunk_tokens=recipe.engine.chunk_tokens)[step].chunks
        ]
        assert len(chunks) > 2
        tokens, slots = sum(chunk.tokens for chunk in chunks), sum(map(model.slots, chunks))
        assert record["padding_fraction"] == pytest.approx(1 - tokens / slots) and 0.05 < 1 - tokens / slots < 1


def test_its_export_gives_the_vectors_of_training_with_and_without_this_project(trained, small_corpus, tmp_path):
    model = load_model(trained / "export")
    read = list(read_documents([small_corpus]))[::9]
    texts = [document.text for document in read]
    expected = np.stack([model.encode(text) for text in texts])
    assert max(len(model.tokenise([text])[0][0]) for text in texts) == 198  # some are longer than it reads
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (tmp_path / "load.py").write_text(textwrap.dedent(LOAD), encoding="utf-8")
    env = environment(HF_HOME=str(tmp_path / "cache"))
    command = [PROGRAMS / "python", "load.py", trained / "export", "texts.json", tmp_path]
    job = finish(start(command, env, folder=tmp_path), 300)
    assert job.code == 0, job.output
    for name in ("auto", "st"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, rtol=1e-5, atol=1e-5)
    assert np.stack(list(encode_documents(model, read))).shape == expected.shape


def test_what_cannot_be_a_longformer_is_refused(trained, monkeypatch):
    def opened(*overrides):
        recipe = load_recipe(trained / "config.yaml", list(overrides))
        mixture = open_mixture(recipe)
        return recipe, build_model(recipe.model, mixture.indexes[0], 1, 20.0, 0, mixture.settings.windows)

    with pytest.raises(InputError, match="attention_window: Input should be a multiple of 2"):
        opened("model.lower.longformer.attention_window=7")
    with pytest.raises(InputError, match=r"did you mean model\.lower\.longformer\.positions"):
        opened("model.lower.longformer.position=7")
    with pytest.raises(InputError, match=r"windows of 199 tokens need .* model\.lower\.longformer"):
        opened("data.segments.window=199")
    with pytest.raises(InputError, match="built from bert, camembert, roberta, xlm-roberta, not from modernbert"):
        opened("model.lower.pretrained=null", "model.lower.config={model_type: modernbert}")
    recipe, encoder = opened("engine.compile=true", "engine.zero_stage=1", "engine.zero3_persistence=null")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with pytest.raises(InputError, match="cannot compile a Longformer"):
        start_engine(recipe, encoder, None)
    with pytest.raises(InputError, match="global attention"):
        PaddedModel(build_model(load_recipe(trained / "config.yaml", ["model.upper={layers: 1, heads: 2}"]).model,
                                ShardIndex.open(recipe.data.shards), 1, 20.0, 0))  # fmt: skip


def test_from_scratch_it_has_the_sizes_of_a_configuration(trained):
    config = "{model_type: xlm-roberta, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}"
    recipe = load_recipe(trained / "config.yaml", ["model.lower.pretrained=null", f"model.lower.config={config}"])
    mixture = open_mixture(recipe)
    lower = build_model(recipe.model, mixture.indexes[0], 1, 20.0, 0, mixture.settings.windows).lower
    assert lower.config.model_type == "longformer" and lower.config.attention_window == [16]
    assert (
        len(lower.embeddings.position_embeddings.weight) == 200 + mixture.indexes[0].manifest["special_ids"]["pad"] + 1
    )
