"""Objectives in real training: several at once, in chunks, on ranks; and one that a reader adds."""

import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from launch import ROOT, SENTENCE_TOKENS, environment, finish, journal, start, torchrun, write_documents, write_recipe

from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.shard_build import build_shards

MIXTURE = [
    {"name": "document_contrast", "trainable_scale": True, "positives": "group", "spread": 0.1, "widths": [16, 32]},
    {"name": "masked_sentence", "weight": 0.5, "copies": 3},
    {"name": "masked_token", "weight": 0.2, "language_embeddings": True, "sentences": 0.7},
    {"name": "sentence_alignment", "weight": 0.2, "temperature": 0.1},
    {"name": "sentence_similarity", "weight": 0.2},
    {"name": "contextual_sentence", "weight": 0.2},
    {"name": "translation_tokens", "weight": 0.1, "language_embedding": 8},
    {"name": "translation_tokens", "weight": 0.1, "level": "document", "masked": False},
]


@pytest.fixture(scope="module")
def parallel_shards(small_corpus, tokenizer, tmp_path_factory) -> Path:
    """Shards of the small corpus, its documents cut to as many short sentences as the others of their group; two in seven are not."""
    folder = tmp_path_factory.mktemp("parallel")
    groups: dict[str, list[Document]] = {}
    for document in read_documents([small_corpus]):
        sentences = split_sentences(document.text, document.lang)
        cut = replace(document, text="", sentences=tuple(sentence[:20] for sentence in sentences))
        groups.setdefault(document.id, []).append(cut)
    documents = []
    for group in groups.values():
        shortest = min(len(document.sentences) for document in group)
        for document in group:
            size = shortest - (len(documents) % 7 < 2)
            documents.append(replace(document, sentences=document.sentences[:size]))
    write_documents(folder / "documents.jsonl", documents)
    build_shards([folder / "documents.jsonl"], tokenizer, SENTENCE_TOKENS, folder / "shards", "mds")
    return folder / "shards"


@pytest.fixture(scope="module")
def one_process(parallel_shards, tmp_path_factory, forks):
    """The recipe of the mixture, and the steps of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("one")
    optimizer = {"learning_rate": 0.01, "epsilon": 1e-3}
    recipe = write_recipe(folder / "recipe.yaml", parallel_shards, objectives=MIXTURE, optimizer=optimizer)
    job = forks.train(1, recipe)
    assert job.codes == [0], job.output
    steps = journal(folder / "run")
    assert all(step["sentence_alignment_aligned"] > 3 for step in steps)
    return recipe, steps


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_mixture_trains_on_two_ranks_in_chunks_as_on_one(stage, tmp_path, one_process, forks):
    """The self-test compares gradients at the start; here losses over steps, which follow the weights."""
    recipe, steps = one_process
    zero = [f"engine.zero_stage={stage}", *["engine.zero3_persistence=0"] * (stage == 3)]
    chunks = ("engine.chunk_tokens=200", f"run.folder={tmp_path}/two", "engine.self_test=true")
    two = forks.train(2, recipe, *zero, *chunks)
    assert two.codes == [0, 0], two.output
    names = [
        name for name in steps[0] if name.endswith("_loss") or name.startswith(tuple(one["name"] for one in MIXTURE))
    ]
    assert "translation_tokens_2_loss" in names  # the second of this name
    for alone, ranks in zip(steps, journal(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "scale", *names):
            if not name.endswith("_accuracy"):  # a near tie may be won by either
                assert ranks[name] == pytest.approx(alone[name], rel=2e-4), name


def test_steps_in_which_nothing_is_aligned_hang_nobody(tmp_path, shards, forks):
    """Few versions of the small corpus have equally many sentences; bf16 and activations that are made again, under ZeRO-3."""
    names = ("translation_tokens", "sentence_alignment", "sentence_similarity")
    objectives = [{"name": "document_contrast"}, *({"name": name} for name in names)]
    engine = {"zero_stage": 3, "zero3_persistence": 0, "precision": "bf16", "activation_checkpointing": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), objectives, engine=engine | {"chunk_tokens": 300})
    job = forks.train(2, recipe, "engine.self_test=true")
    assert job.codes == [0, 0], job.output
    steps = journal(tmp_path / "run")
    assert min(step["sentence_alignment_aligned"] for step in steps) == 0
    for step in steps:
        aligned = step["sentence_alignment_aligned"]
        assert step["translation_tokens_aligned"] == step["sentence_similarity_aligned"] == aligned
        assert all((step[f"{name}_loss"] > 0) == (aligned > 0) for name in names[:2])


def test_a_reader_adds_an_objective_by_the_recipe_of_the_docs(tmp_path, shards):
    """One new file and one recipe: exactly those that docs/add-an-objective.md shows."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "hmde_dist", checkout / "hmde_dist", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "add-an-objective.md").read_text(encoding="utf-8")
    code, recipe = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    (checkout / "hmde_dist" / "objectives" / "sentence_count.py").write_text(code, encoding="utf-8")
    base = write_recipe(tmp_path / "base.yaml", shards("mds"))
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.replace("extends: demo.yaml", f"extends: {base.name}"), encoding="utf-8")
    job = finish(
        start(
            torchrun(2, checkout / "hmde_dist/train.py", path, "engine.chunk_tokens=300", f"run.folder={tmp_path}/run"),
            environment(PYTHONPATH=str(checkout)),
            folder=checkout,
        )
    )
    assert job.code == 0, job.output
    assert all(record["sentence_count_loss"] > 0 for record in journal(tmp_path / "run"))
    first = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[1])
    assert first["event"] == "self_test" and abs(first["norm_ratio"] - 1) < 1e-3


def test_an_unknown_objective_and_an_unknown_setting_of_one_are_named(tmp_path, shards, forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"))

    def refusal(override):
        job = forks.train(1, recipe, override, "--print-config")
        assert job.codes == [2]
        return job.output

    assert "no objective 'contrast'; there are context_prediction, contextual_sentence, " in refusal(
        "objectives=[{name: contrast}]"
    )
    message = textwrap.dedent("objectives.0.trainable_scal: no such setting; did you mean trainable_scale?")
    assert message in refusal("objectives.0.trainable_scal=true")
    assert "1 is no number from 0 to 0" in refusal("objectives.1.weight=2")
