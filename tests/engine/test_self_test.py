"""The self-test at start: passes where gradients are right (the trainings of test_ranks.py run it), and refuses where not."""

import textwrap

import pytest
from launch import journal, write_recipe

FAULTS = {
    # What DeepSpeed does with one backward pass for each chunk under ZeRO 1 and 2: only the last chunk's gradient stays.
    "naive": """
        from contextlib import contextmanager, nullcontext
        from hmde_dist.engine import gradient_cache

        @contextmanager
        def naive(engine):
            yield nullcontext

        gradient_cache._one_reduction = naive
    """,
    # A gather whose backward pass keeps this rank's own share.
    "own share": """
        from hmde_dist.objectives.gather import Ranks
        Ranks.reduce_scatter = lambda self, t: t.view(self.size, -1, *t.shape[1:])[self.rank].clone()
    """,
    # Dropout that is another one the second time.
    "no replay": """
        import torch
        seeds = iter(range(10**6))
        torch.manual_seed, real = lambda seed: real(next(seeds)), torch.manual_seed
    """,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gradient_that_is_off_is_refused(fault, tmp_path, shards, forks):
    upper = {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.3}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"), model={"upper": upper})
    settings = ("engine.self_test=true", "engine.zero_stage=2", "engine.chunk_tokens=200")
    job = forks.train(2, recipe, *settings, patch=textwrap.dedent(FAULTS[fault]))
    assert 1 in job.codes and 0 not in job.codes, job.output
    assert "self-test: the gradient of 2 ranks under ZeRO 2 is not that of one process" in job.output
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_it_leaves_no_trace_in_the_run(tmp_path, shards, forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    for name, setting in (("with", "true"), ("without", "false")):
        settings = (f"run.folder={tmp_path}/{name}", f"engine.self_test={setting}", "engine.zero_stage=2")
        job = forks.train(2, recipe, *settings)
        assert job.codes == [0, 0], job.output
    facts = [[(r["loss"], r["grad_norm"]) for r in journal(tmp_path / name)] for name in ("with", "without")]
    assert facts[0] == facts[1]
