"""Validation while training: the numbers of the evaluation, the same on any ranks, and the best checkpoint."""

import numpy as np
import pytest
import torch
from forks import Forks
from launch import write_recipe

from hmde_dist.corpus.readers import read_documents
from hmde_dist.engine.checkpoint import load_weights, steps_in
from hmde_dist.evaluation.bias import language_bias
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.evaluation.retrieval import Candidates, cosine_scorer, language_pairs, macro, retrieval
from hmde_dist.evaluation.run_report import read_journal
from hmde_dist.evaluation.validation import best_so_far, validate
from hmde_dist.model.export import load_model
from hmde_dist.stream.index import ShardIndex
from hmde_dist.topology import World
from hmde_dist.train import export_run

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Reader(torch.nn.Module):
    """An encoder that reads only the first sentences of a document: the mean of random vectors of their tokens."""

    def __init__(self, vocabulary: int, sentences: int):
        super().__init__()
        table = torch.randn(vocabulary, 64, generator=torch.Generator().manual_seed(0))
        self.tokens, self.sentences = torch.nn.Embedding.from_pretrained(table), sentences

    def forward(self, batch):
        pieces = torch.tensor_split(self.tokens(batch.ids), batch.lower.starts[1:-1].long())
        rows = torch.stack([piece[1:-1].mean(dim=0) for piece in pieces])[batch.sentence_rows]
        return torch.stack([rows[: self.sentences].mean(0) for rows in rows.split(batch.sentence_counts)])


class Documents(torch.nn.Module):
    """What the engine gives in evaluation mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch).documents


@pytest.fixture
def validation(shards):
    return ShardIndex.open(shards("mds", "validation"))


@pytest.mark.parametrize("folder", ["model_folder", "windows_folder"])
def test_the_numbers_are_those_of_the_evaluation(folder, validation, documents_folder, request):
    model = load_model(request.getfixturevalue(folder))
    found = validate(Documents(model), validation, model.config.max_sentences, ALONE, windows=model.windows)
    documents = list(read_documents([documents_folder / "validation.jsonl.gz"]))
    vectors = np.stack(list(encode_documents(model.eval(), documents)))
    candidates = Candidates([d.id for d in documents], [d.lang for d in documents])
    expected = macro(retrieval(candidates, cosine_scorer(vectors), language_pairs(candidates)))
    assert [found.scores[name] for name in ("R@1", "nDCG@10")] == pytest.approx([expected["R@1"], expected["nDCG@10"]])
    bias = language_bias(documents, lambda _: vectors)["macro"]
    assert found.scores["language_bias"] == pytest.approx(bias["same_language"])
    assert found.scores["language_gap"] == pytest.approx(bias["gap"])
    # All documents here: the projector would show them all.
    ids = {(d.id, d.lang, d.categories[0]): vector for d, vector in zip(documents, vectors, strict=True)}
    assert {label[:2] for label in found.labels} == {label[:2] for label in ids} and len(found.labels) == len(documents)
    by_key = {label[:2]: vector for label, vector in ids.items()}
    assert np.stack([by_key[label[:2]] for label in found.labels]) == pytest.approx(found.vectors, abs=1e-5)


def test_an_encoder_of_the_first_sentence_has_position_bias_and_one_of_all_has_none(shards):
    index = ShardIndex.open(shards("mds"))
    slopes = []
    for sentences in (1, 100):
        engine = Reader(index.manifest["vocabulary"], sentences)
        slopes.append(validate(engine, index, 8, ALONE).scores["position_bias"])
    assert slopes[0] < -0.1
    assert abs(slopes[1]) < 1e-4


@pytest.mark.parametrize(
    ("best", "metric", "step", "expected"),
    [
        ({"step": 0}, None, 3, 0),
        ({"step": 0}, "R@1", 3, 3),
        ({"step": 3, "metric": "R@1", "value": 0.4}, "R@1", 5, 5),
        ({"step": 3, "metric": "R@1", "value": 0.5}, "R@1", 5, 3),
        ({"step": 3, "metric": "R@10", "value": 0.9}, "R@1", 5, 5),
    ],
)
def test_the_best_is_the_first_of_the_highest(best, metric, step, expected):
    assert best_so_far(best, metric, step, {"R@1": 0.5, "R@10": 0.8})["step"] == expected


def test_the_best_checkpoint_stays_through_resuming_and_can_be_exported(tmp_path, shards, forks: Forks):
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        data={"validation": str(shards("mds", "validation"))},
        engine={"zero_stage": 2},
        optimizer={"schedule": "constant"},
        run={"log_every": 1, "validate_every": 1, "best_metric": "R@1", "keep_checkpoints": 1},
    )
    run = tmp_path / "run"
    for steps in (3, 6):
        ended = forks.train(2, recipe, f"run.steps={steps}", f"run.folder={run}")
        assert ended.codes == [0, 0], ended.output
    scores = validations(run)
    assert list(scores) == list(range(1, 7))
    best = max(scores, key=lambda step: (scores[step]["R@1"], -step))
    assert steps_in(run / "checkpoints") == sorted({best, 6})
    weights, state = load_weights(run)
    assert state["best"] == {"step": best, "metric": "R@1", "value": scores[best]["R@1"]}
    export_run(run, tmp_path / "best", best=True)
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert f"After step {best}," in card and f"| R@1 | {scores[best]['R@1']:.3f} |" in card
    assert "| train.jsonl.gz | 37 | 222 |" in card and str(tmp_path) not in card
    weights, _ = load_weights(run, best)
    assert torch.equal(load_model(tmp_path / "best").upper.dcls, weights["encoder.upper.dcls"])
    # TensorBoard's projector shows the documents as they were in the end.
    projected = run / "tensorboard" / "00006" / "validation"
    labels = (projected / "metadata.tsv").read_text(encoding="utf-8").splitlines()
    assert labels[0].split("\t") == ["id", "language", "category"]
    assert len(labels) - 1 == len((projected / "tensors.tsv").read_text().splitlines()) == 24
    # One rank finds what two found.
    ended = forks.train(1, recipe, "run.steps=1", f"run.folder={tmp_path}/alone")
    assert ended.codes == [0], ended.output
    alone = validations(tmp_path / "alone")[1]
    for name in ("R@1", "MRR@10", "position_bias", "language_bias", "language_gap"):
        assert alone[name] == pytest.approx(scores[1][name], abs=1e-3), name


def validations(run):
    return {record["step"]: record for record in read_journal(run) if record.get("event") == "validation"}
