"""Objectives in real training: several at once, in chunks, on ranks; and one that a reader adds."""

import json
import shutil
import textwrap

import pytest
from launch import PROGRAMS, ROOT, environment, finish, journal, start, torchrun, write_recipe

MIXTURE = [
    {"name": "document_contrast", "trainable_scale": True, "positives": "group", "spread": 0.1, "widths": [16, 32]},
    {"name": "masked_sentence", "weight": 0.5, "copies": 3},
    {"name": "masked_token", "weight": 0.2, "language_embeddings": True, "sentences": 0.7},
    {"name": "sentence_alignment", "weight": 0.2, "temperature": 0.1},
    {"name": "sentence_similarity", "weight": 0.2},
    {"name": "contextual_sentence", "weight": 0.2},
]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_mixture_trains_on_two_ranks_in_chunks_as_on_one(stage, tmp_path, shards):
    """The self-test compares gradients at the start; here losses over steps, which follow the weights."""
    optimizer = {"learning_rate": 0.01, "epsilon": 1e-3}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), objectives=MIXTURE, optimizer=optimizer)
    zero = [f"engine.zero_stage={stage}", *["engine.zero3_persistence=0"] * (stage == 3)]
    one = finish(start([PROGRAMS / "python", "hmde_dist/train.py", recipe, f"run.folder={tmp_path}/one"]))
    assert one.code == 0, one.output
    chunks = ("engine.chunk_tokens=300", f"run.folder={tmp_path}/two")
    two = finish(start(torchrun(2, "hmde_dist/train.py", recipe, *zero, *chunks)))
    assert two.code == 0, two.output
    for alone, ranks in zip(journal(tmp_path / "one"), journal(tmp_path / "two"), strict=True):
        for name in (
            "loss",
            "grad_norm",
            "scale",
            "document_contrast_spread",
            "masked_sentence_loss",
            "masked_sentence_plain",
            "masked_token_loss",
            "sentence_alignment_loss",
            "sentence_alignment_aligned",
            "sentence_similarity_loss",
            "contextual_sentence_loss",
        ):
            assert ranks[name] == pytest.approx(alone[name], rel=2e-4), name


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


def test_an_unknown_objective_and_an_unknown_setting_of_one_are_named(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"))

    def refusal(override):
        job = finish(start([PROGRAMS / "python", "hmde_dist/train.py", recipe, override, "--print-config"]))
        assert job.code == 2
        return job.output

    assert "no objective 'contrast'; there are document_contrast, masked_sentence" in refusal(
        "objectives=[{name: contrast}]"
    )
    message = textwrap.dedent("objectives.0.trainable_scal: no such setting; did you mean trainable_scale?")
    assert message in refusal("objectives.0.trainable_scal=true")
    assert "1 is no number from 0 to 0" in refusal("objectives.1.weight=2")
