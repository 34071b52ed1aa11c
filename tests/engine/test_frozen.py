"""A frozen sentence encoder: its vectors are computed once, training reads them, and unfreezing goes on from there."""

import json
import shutil

import numpy as np
import pytest
import torch
from launch import journal, write_recipe
from safetensors.torch import load_file

from hmde_dist.command import InputError
from hmde_dist.engine import frozen
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import build_model, untrained_model
from hmde_dist.preflight import open_mixture
from hmde_dist.recipe import SegmentsSection, load_recipe
from hmde_dist.stream import sentence_vectors as store
from hmde_dist.stream.loader import RankBatches
from hmde_dist.stream.sentence_vectors import SentenceVectors, VectorLayout
from hmde_dist.stream.sliding_windows import SlidingWindows
from hmde_dist.topology import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FROZEN = ("model.lower.frozen=true", "run.steps=8", "optimizer.layer_decay=0.5", "optimizer.warmup_steps=1")


@pytest.fixture
def setting(tmp_path, shards, monkeypatch):
    """A recipe, its encoder and its data; vectors go below tmp_path, in blocks of 100 sentences."""
    monkeypatch.setattr(store, "BLOCK_ROWS", 100)
    monkeypatch.setattr(frozen, "vectors_folder", lambda index: tmp_path / "vectors")
    path = write_recipe(tmp_path / "recipe.yaml", shards("mds"), data={"window": "random"})
    recipe = load_recipe(path, ["model.lower.frozen=true", "data.sentences=3"])
    mixture = open_mixture(recipe)
    encoder = build_model(recipe.model, mixture.indexes[0], recipe.data.sentences, 20.0, 0)
    return recipe, mixture, encoder


@pytest.fixture
def windows_setting(setting):
    """The same with documents cut into windows of tokens."""
    recipe = recipe_of_windows(setting[0])
    mixture = open_mixture(recipe)
    return recipe, mixture, build_model(recipe.model, mixture.indexes[0], 3, 20.0, 0, mixture.settings.windows)


def recipe_of_windows(recipe):
    segments = SegmentsSection(window=20, stride=12)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"segments": segments})})


@pytest.mark.parametrize("kind", ["setting", "windows_setting"])
def test_documents_read_as_vectors_are_those_read_as_tokens(kind, request):
    """Windows, ragged documents and chunks included, to the precision of bf16."""
    recipe, mixture, encoder = request.getfixturevalue(kind)
    vectors = frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    encoder.eval()
    for step in range(4):
        tokens = RankBatches(mixture, 0, 1, chunk_tokens=400)[step]
        read = RankBatches(mixture, 0, 1, chunk_tokens=400, vectors=vectors)[step]
        assert len(tokens.chunks) == len(read.chunks) > 1
        documents = []
        for batch in (tokens, read):
            rows = torch.empty(batch.documents, 32)
            for chunk in batch.chunks:
                with torch.no_grad():
                    rows[chunk.facts.numbers] = encoder(chunk).documents
            documents.append(torch.nn.functional.normalize(rows))
        assert (documents[0] * documents[1]).sum(1).min() > 0.999
        assert all(len(chunk.ids) == 0 for chunk in read.chunks)
        assert read.slots == read.tokens == pytest.approx(tokens.tokens, rel=0.1)


def test_vectors_are_computed_once_and_a_missing_block_alone_is_made_anew(setting, monkeypatch):
    recipe, mixture, encoder = setting
    (vectors,) = frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    blocks = sorted(vectors.folder.glob("block-*.bf16"))
    assert len(blocks) == vectors.layout.blocks > 3
    before = {block: (block.read_bytes(), block.stat().st_mtime_ns) for block in blocks}
    with monkeypatch.context() as patch:
        patch.setattr(frozen, "_compute", None)  # not called
        frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    blocks[1].write_bytes(blocks[1].read_bytes()[:-2])
    with pytest.raises(InputError, match=r"block-00001.*missing or damaged.*only this block"):
        frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    (vectors.folder / "manifest.json").unlink()
    frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    assert {block: block.read_bytes() for block in blocks} == {block: old for block, (old, _) in before.items()}
    assert [b for b in blocks if b.stat().st_mtime_ns != before[b][1]] == [blocks[1]]
    # Other weights, other vectors.
    with torch.no_grad():
        encoder.lower.embeddings.word_embeddings.weight[5] += 1
    frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    assert len(list(vectors.folder.parent.iterdir())) == 2
    # And other segments.
    encoder.config.segments, encoder.windows = {"window": 20, "stride": 12}, SlidingWindows(20, 12)
    frozen.sentence_vectors(recipe, encoder, mixture.indexes, ALONE)
    assert len(list(vectors.folder.parent.iterdir())) == 3


ANOTHER_DISK = """
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda path: is_file(path) and not (rank == 1 and ".vectors" in str(path))
"""


def test_nodes_that_do_not_see_the_same_folder_are_told_before_anything_is_computed(tmp_path, shards, forks):
    data = tmp_path / "shards"
    shutil.copytree(shards("mds"), data)
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    job = forks.train(2, recipe, *FROZEN, patch=ANOTHER_DISK)
    assert job.codes[0] == 2 and "not the same folder on all nodes" in job.output, job.output
    assert [path.name for path in tmp_path.glob("shards.vectors/*/*")] == []


@pytest.mark.parametrize("limit", [None, 2])
def test_every_document_lies_in_one_block(setting, limit, tmp_path):
    _, mixture, _ = setting
    index = mixture.indexes[0]
    layout = VectorLayout.of(index, 4, limit)
    counts = index.columns["document_sentences"].astype(int)
    counts = counts if limit is None else np.minimum(counts, limit)
    assert layout.first_row.tolist() == [0, *np.cumsum(counts).tolist()]
    assert sum(map(layout.block_rows, range(layout.blocks))) == counts.sum()
    assert layout.first_document[0] == 0 and layout.first_document[-1] == len(counts)
    rows = np.arange(counts.sum() * 4, dtype=np.int16).reshape(-1, 4)
    for block in range(layout.blocks):
        first, stop = layout.first_row[layout.first_document[block : block + 2]]
        layout.block_file(tmp_path, block).write_bytes(rows[first:stop].tobytes())
    (tmp_path / "manifest.json").write_text("{}")
    vectors = SentenceVectors(tmp_path, layout)
    for number, (first, count) in enumerate(zip(layout.first_row, counts, strict=False)):
        assert vectors.document(number, 0, 99).tolist() == rows[first : first + count].tolist()
        assert vectors.document(number, 1, 1).tolist() == rows[first + 1 : first + min(2, count)].tolist()


def lower_change(run):
    """Largest change of each part of the sentence encoder since the start."""
    trained = load_file(run / "export" / "model.safetensors")
    initial = untrained_model(HMDEConfig.from_pretrained(run / "export"), seed=0).state_dict()
    return {name: float((trained[name] - initial[name]).abs().max()) for name in trained if name.startswith("lower.")}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_unfreezing_trains_all_weights_and_a_stop_in_either_phase_changes_nothing(stage, tmp_path, shards, forks):
    zero = [f"engine.zero_stage={stage}", *["engine.zero3_persistence=0"] * (stage == 3)]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"))
    # A run made longer is the same run, for the rate stays.
    settings = (*FROZEN, *zero, "model.lower.unfreeze_at_step=4", "optimizer.schedule=constant")
    settings += ("engine.self_test=true",)  # of the frozen model and of the whole

    def train(name, *more):
        job = forks.train(2, recipe, *settings, f"run.folder={tmp_path}/{name}", *more)
        assert job.codes == [0, 0], job.output

    train("whole")
    events = [json.loads(line) for line in (tmp_path / "whole" / "journal.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e.get("event") == "unfrozen"] == [4]
    moved = lower_change(tmp_path / "whole")
    # The embeddings are two layers below the document encoder: a quarter of its rate.
    assert max(moved.values()) > 1e-3
    assert max(v for name, v in moved.items() if "embeddings" in name) < 0.25 * 4 * 0.01
    for steps in (2, 6, 8):
        train("parts", f"run.steps={steps}")
    facts = [[(r["step"], r["loss"], r["grad_norm"]) for r in journal(tmp_path / n)] for n in ("parts", "whole")]
    assert facts[0] == facts[1]


def test_a_frozen_encoder_keeps_its_weights(tmp_path, shards, forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), data={"workers": 1})
    job = forks.train(1, recipe, *FROZEN, "engine.zero_stage=1")
    assert job.codes == [0], job.output
    assert set(lower_change(tmp_path / "run").values()) == {0.0}
    losses = [record["loss"] for record in journal(tmp_path / "run")]
    assert len(losses) == 8 and losses[-1] != losses[0]
