"""Distillation: the formula in plain Python, its laws, ranks, and the table a teacher is looked up in."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from launch import journal, write_recipe
from toy import (
    TEACHER_WIDTH,
    assert_ranks_are_one_process,
    batch_of_pairs,
    loss_of,
    mean_cosine,
    model,
    objective_of,
    train,
)
from vector_folders import write_vectors

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.stream.teacher import Teacher

SETTINGS = {"width": TEACHER_WIDTH}


def by_hand(objective, documents, teacher):
    weight, bias = objective.project.weight.tolist(), objective.project.bias.tolist()
    losses = []
    for z, t in zip(documents.tolist(), teacher.tolist(), strict=True):
        if not any(map(math.isnan, t)):
            p = [sum(w * x for w, x in zip(row, z, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            dot = sum(a * b for a, b in zip(p, t, strict=True))
            losses.append(1 - dot / math.sqrt(sum(a * a for a in p) * sum(b * b for b in t)))
    return sum(losses) / len(losses)


def test_the_loss_is_the_formula():
    encoder = model().double()
    objective, batch = objective_of("distillation", encoder, **SETTINGS).double(), batch_of_pairs([0, 1, 2, 5])
    found = loss_of(encoder, objective, [batch])
    expected = by_hand(objective, encoder(batch).documents, torch.from_numpy(batch.facts.teacher))
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-6)  # the teacher's vectors are fp32
    assert found.watched["missing"] == 0.25 and found.negatives == 5


def test_documents_the_teacher_does_not_know_and_the_length_of_its_vectors_change_nothing():
    encoder = model()
    objective = objective_of("distillation", encoder, **SETTINGS)
    alone = loss_of(encoder, objective, [batch_of_pairs([0, 1])])
    batch = batch_of_pairs([0, 1, 4])
    batch.facts.teacher[:] *= 7
    more = loss_of(encoder, objective, [batch])
    torch.testing.assert_close((more.loss, more.accuracy), (alone.loss, alone.accuracy))
    nothing = loss_of(encoder, objective, [batch_of_pairs([2, 4])])
    nothing.loss.backward()
    assert nothing.loss == 0 and nothing.watched["missing"] == 1
    assert all(p.grad is None or not p.grad.any() for p in (*encoder.parameters(), *objective.parameters()))


def test_it_learns_and_does_not_collapse():
    encoder, batch = model(), batch_of_pairs([0, 1, 3, 5])
    history = train(encoder, [objective_of("distillation", encoder, **SETTINGS)], batch)
    assert history[-1][0].loss < 0.1 * history[0][0].loss and history[-1][0].accuracy > 0.9
    assert mean_cosine(encoder(batch).documents[:4]) < 0.6


def test_ragged_ranks_are_one_process(forks):
    assert_ranks_are_one_process(forks, "distillation", SETTINGS)


@pytest.fixture(scope="module")
def teacher(small_corpus, tmp_path_factory):
    """Vectors of all documents of the small corpus but every fifth, in another order than the shards'."""
    documents = [(d.id, d.lang) for d in read_documents([small_corpus])][::-1]
    known = [one for number, one in enumerate(documents) if number % 5]
    rows = np.random.default_rng(0).normal(size=(len(known), TEACHER_WIDTH)).astype(np.float32)
    folder = tmp_path_factory.mktemp("teacher") / "vectors"
    write_vectors(folder, rows, shard_rows=50, documents=known)
    return folder, dict(zip(known, rows, strict=True)), set(documents) - set(known)


def test_vectors_are_looked_up_by_id_and_language(teacher):
    folder, known, unknown = teacher
    wanted = [*known, *unknown, ("no such id", "en")]
    found = Teacher(folder).vectors(*zip(*wanted, strict=True))
    np.testing.assert_array_equal(found[: len(known)], np.stack(list(known.values())))
    assert np.isnan(found[len(known) :]).all() and len(unknown) > 3
    assert Teacher(folder).vectors([], []).shape == (0, TEACHER_WIDTH)


@pytest.mark.parametrize("frozen", [False, True])
def test_two_ranks_in_chunks_learn_from_it_as_one(teacher, shards, tmp_path, forks, frozen):
    objectives = [{"name": "document_contrast"}, {"name": "distillation", "width": TEACHER_WIDTH}]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), objectives, optimizer={"epsilon": 1e-3})
    common = (f"data.teacher={teacher[0]}", "engine.self_test=true", f"model.lower.frozen={str(frozen).lower()}")
    one = forks.train(1, recipe, *common, f"run.folder={tmp_path}/one")
    two = forks.train(
        2, recipe, *common, "engine.zero_stage=3", "engine.zero3_persistence=0", "engine.chunk_tokens=200"
    )
    assert one.codes == [0] and two.codes == [0, 0], one.output + two.output
    for alone, ranks in zip(journal(tmp_path / "one"), journal(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "distillation_loss", "distillation_missing"):
            assert ranks[name] == pytest.approx(alone[name], rel=2e-4), name
        assert 0 < alone["distillation_missing"] < 0.6


def test_a_run_goes_on_with_the_teacher_it_had(teacher, shards, tmp_path, forks):
    objectives = [{"name": "distillation", "width": TEACHER_WIDTH}]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), objectives)
    moved = shutil.copytree(teacher[0], tmp_path / "moved")
    for folder, steps, code in ((teacher[0], 2, 0), (moved, 3, 0)):
        job = forks.train(1, recipe, f"data.teacher={folder}", f"run.steps={steps}", "optimizer.schedule=constant")
        assert job.codes == [code], job.output
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(manifest | {"model": {"name": "another", "sha256": "1"}}))
    job = forks.train(1, recipe, f"data.teacher={moved}", "run.steps=4", "optimizer.schedule=constant")
    assert job.codes == [2] and "teacher was" in job.output, job.output


def test_a_teacher_that_cannot_teach_is_refused(teacher, shards, tmp_path, forks):
    folder = teacher[0]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), [{"name": "distillation", "width": TEACHER_WIDTH}])
    other = write_vectors(tmp_path / "other", np.ones((3, TEACHER_WIDTH), np.float32))
    refused = [
        ((), "distillation needs data.teacher"),
        ((f"data.teacher={folder}", "objectives.0.width=13"), "objectives.0.width=13: the vectors"),
        ((f"data.teacher={other}",), "no vector of any of"),
        ((f"data.teacher={tmp_path}/none",), "no folder of vectors"),
        ((f"data.teacher={folder}", "objectives=[{name: document_contrast}]"), "acts with the objective distillation"),
    ]
    for overrides, problem in refused:
        job = forks.train(1, recipe, *overrides)
        assert job.codes == [2] and problem in job.output, job.output
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"output": "sentence"}))
    with pytest.raises(InputError, match="not vectors of documents"):
        Teacher(other)
    shutil.copytree(folder, folder.parent / "broken")
    (folder.parent / "broken" / "documents.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"documents\.jsonl: missing or damaged"):
        Teacher(folder.parent / "broken")
