"""The self-test at start: passes where gradients are right (every training of the suite runs it), and refuses where not."""

import textwrap

import pytest
from launch import environment, finish, journal, start, torchrun, train, write_recipe

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
        from hmde_dist.objectives.tile_loss import Ranks
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
def test_a_gradient_that_is_off_is_refused(fault, tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent(FAULTS[fault])
        + "\nimport sys\nfrom hmde_dist.command import run_command\nfrom hmde_dist.train import main\nrun_command(main)\n"
    )
    dropout = "model.upper={layers: 1, heads: 2, intermediate: 64, dropout: 0.3}"
    job = finish(
        start(torchrun(2, script, recipe, "engine.zero_stage=2", "engine.chunk_tokens=200", dropout), environment())
    )
    assert job.code == 1, job.output
    assert "self-test: the gradient of 2 ranks under ZeRO 2 is not that of one process" in job.output
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_it_leaves_no_trace_in_the_run(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("wds"))
    for name, setting in (("with", "true"), ("without", "false")):
        job = train(2, recipe, f"run.folder={tmp_path}/{name}", f"engine.self_test={setting}", "engine.zero_stage=2")
        assert job.code == 0, job.output
    facts = [[(r["loss"], r["grad_norm"]) for r in journal(tmp_path / name)] for name in ("with", "without")]
    assert facts[0] == facts[1]
