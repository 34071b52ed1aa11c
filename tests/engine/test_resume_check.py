"""The tool that proves exact resume: it must see what it is there to see."""

import json

import pytest
from forks import Forks
from launch import write_recipe

from hmde_dist.command import RunError
from hmde_dist.engine import resume_check
from hmde_dist.recipe import load_recipe


@pytest.fixture
def forked(monkeypatch, forks: Forks):
    """The runs are forked rather than launched."""

    def train(recipe, ranks):
        run = recipe.run.folder
        file = run.parent / f"{run.name}.yaml"
        run.mkdir(parents=True, exist_ok=True)
        file.write_text(resume_check.dump_recipe(recipe))
        ended = forks.train(ranks, file)
        assert ended.codes == [0] * ranks, ended.output
        return run

    monkeypatch.setattr(resume_check, "_train", train)


def test_a_run_that_resumes_is_said_to_and_one_that_does_not_is_not(tmp_path, shards, forked):
    recipe = load_recipe(
        write_recipe(
            tmp_path / "recipe.yaml",
            shards("mds"),
            engine={"zero_stage": 1},
            optimizer={"learning_rate": 1e-3, "warmup_steps": 100},
            run={"steps": 1000},
        )
    )
    said = []
    same, other = resume_check.verify_resume(recipe, 2, 1, 4, tmp_path / "runs", said.append)
    assert same.holds and same.batches and same.loss == 0 and same.weights == 0
    assert other.holds and other.batches and 0 <= other.loss < 1e-6 and 0 < other.weights < 1e-4
    assert said == [
        "4 steps on 2 ranks, without interruption",
        "steps 3 to 4 on 2 ranks, from the checkpoint of step 2",
        "steps 3 to 4 on 1 ranks, from the checkpoint of step 2",
    ]
    # A run that saw another batch, or whose loss went another way, is found out.
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "resumed-on-1"
    text = (run / "journal.jsonl").read_text()
    for name, change in (("tokens", 1), ("loss", 1e-4)):
        records = [json.loads(line) for line in text.splitlines()]
        for record in records:
            if record.get("step") == 4 and "loss" in record:
                record[name] += change
        (run / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        row = resume_check._compare(whole, run, "tampered", 2, False, "fp32")
        assert not row.holds and row.batches == (name == "loss")
    # Nor does another world count as the same ranks.
    (run / "journal.jsonl").write_text(text)
    assert not resume_check._compare(whole, run, "other ranks", 2, True, "fp32").holds


def test_a_run_that_fails_is_told_with_its_own_line(tmp_path, shards):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", shards("mds"), data={"pairs_per_batch": 7}))
    with pytest.raises(RunError, match="pairs_per_batch=7 is not divisible by 2 ranks"):
        resume_check.verify_resume(recipe, 2, None, 2, tmp_path / "runs", lambda line: None)
