"""An exported folder needs nothing of this project and gives the vectors of the trained model."""

import json
import textwrap

import numpy as np
import pytest
import torch
from launch import PROGRAMS, environment, finish, start

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.model.export import load_model, untrained_model
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.recipe import load_recipe
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import packing_settings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.train import export_run

LOAD = """
    import json, sys
    import numpy as np

    sys.modules["hmde_dist"] = None  # whatever imports the project fails
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    folder, texts, out = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    np.save(out + "/auto.npy", model.encode(texts))
    sentence_transformer = SentenceTransformer(folder, trust_remote_code=True)
    np.save(out + "/st.npy", sentence_transformer.encode(texts))
    sentence_transformer.save(out + "/again")
    again = SentenceTransformer(out + "/again", trust_remote_code=True)
    assert np.array_equal(again.encode(texts[:2]), sentence_transformer.encode(texts[:2]))
"""


@pytest.fixture
def run(trained_run):
    return trained_run


def test_auto_model_and_sentence_transformer_give_the_vectors_of_the_trained_model(run, small_corpus, tmp_path):
    documents = list(read_documents([small_corpus]))[::7]
    texts = [document.text for document in documents]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (tmp_path / "load.py").write_text(textwrap.dedent(LOAD), encoding="utf-8")
    # A module cache of its own: an earlier copy of the code must not stand in for a file that is missing now.
    env = environment(HF_HOME=str(tmp_path / "cache"))
    job = finish(start([PROGRAMS / "python", "load.py", run / "export", "texts.json", tmp_path], env, folder=tmp_path))
    assert job.code == 0, job.output
    expected = np.stack([load_model(run / "export").encode(text) for text in texts])
    for name in ("auto", "st"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, rtol=1e-5, atol=1e-5)


def test_the_export_encodes_a_document_as_training_saw_it(run, small_corpus):
    recipe = load_recipe(run / "config.yaml")
    index = ShardIndex.open(recipe.data.shards)
    model = load_model(run / "export")
    by_key = {(d.id, d.lang): d for d in read_documents([small_corpus])}
    sample = GroupReader(index)[5]
    batch = pack(
        [sample.document(number) for number in range(len(sample.languages))],
        **packing_settings(index, recipe.data.sentences),
    )
    with torch.no_grad():
        trained = model(batch).documents.numpy()
    documents = [by_key[sample.id, language] for language in sample.languages]
    encoded = np.stack(list(encode_documents(model, documents)))
    np.testing.assert_allclose(encoded, trained, rtol=1e-5, atol=1e-5)


def test_the_mean_of_sentence_vectors_is_that(run, small_corpus):
    model = load_model(run / "export")
    document = next(iter(read_documents([small_corpus])))
    (found,) = encode_documents(model, [document], "sentence-mean")
    batch = model.pack(model.tokenise([document.text]))
    with torch.no_grad():
        expected = model(batch).sentences.mean(dim=0).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_training_moved_the_weights_and_the_untrained_model_is_where_it_began(run):
    model = load_model(run / "export")
    fresh = untrained_model(model.config, seed=0)
    moved = [name for name, p in fresh.state_dict().items() if not torch.equal(p, model.state_dict()[name])]
    assert len(moved) > 0.8 * len(fresh.state_dict())
    again = untrained_model(model.config, seed=0)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in fresh.state_dict().items())


def test_a_pretrained_sentence_encoder_starts_from_its_weights(run, tmp_path):
    lower = load_model(run / "export").lower
    lower.save_pretrained(tmp_path / "lower")
    recipe = load_recipe(run / "config.yaml", ["model.lower.config=null", f"model.lower.pretrained={tmp_path}/lower"])
    from hmde_dist.model.export import build_model

    model = build_model(recipe.model, ShardIndex.open(recipe.data.shards), 6, 20.0, seed=3)
    assert isinstance(model, HMDEModel)
    assert all(torch.equal(p, lower.state_dict()[name]) for name, p in model.lower.state_dict().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lower.config.max_position_embeddings=20", "positions"),
        ("model.upper.heads=5", "does not divide"),
        ("model.lower.config.model_type=nonsense", "model.lower.config"),
        ("model.lower.config.num_attention_heads=5", "no encoder can be built"),
        ("model.lower.config.vocab_size=5", "leave it out"),
    ],
)
def test_a_model_that_does_not_fit_the_shards_is_refused(run, override, message):
    from hmde_dist.model.export import build_model

    recipe = load_recipe(run / "config.yaml", [override])
    with pytest.raises(InputError, match=message):
        build_model(recipe.model, ShardIndex.open(recipe.data.shards), 6, 20.0, seed=0)


def test_folders_that_are_no_model_are_refused(tmp_path, run):
    with pytest.raises(InputError, match="no exported model"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        export_run(run, run / "export")
    with pytest.raises(InputError, match="no complete checkpoint"):
        (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
