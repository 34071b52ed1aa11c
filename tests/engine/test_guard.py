"""Bad steps: seen before the weights move, dropped on all ranks, escalated within their budgets."""

import json
import math
import random

import pytest
from forks import Forks
from launch import write_recipe
from test_resume import checksums, facts, zero

from hmde_dist.engine.guard import APPLY, ROLL_BACK, SKIP, STOP, Guard
from hmde_dist.recipe import GuardSection

NAN = float("nan")


def guard_after(settings, values=()):
    guard = Guard(settings)
    for batch, value in enumerate(values):
        assert guard.judge(batch, value, value) == (APPLY, "")
    return guard


def test_a_calm_run_is_left_alone_and_a_spike_is_not():
    draw = random.Random(5)
    guard = guard_after(GuardSection(), [math.exp(draw.gauss(0, 0.5)) for _ in range(3000)])
    assert guard.judge(3000, 1.0, 3e4)[0] == SKIP and "gradient norm is 3e+04" in guard.skipped[-1]["reason"]
    assert guard.judge(3001, 3e4, 1.0)[0] == SKIP and "loss is 3e+04" in guard.skipped[-1]["reason"]
    assert guard.judge(3002, 1.0, 1.0)[0] == APPLY
    assert len(guard.applied["0"]) == 128


def test_falling_losses_warm_up_and_the_first_steps_are_no_spikes():
    guard_after(GuardSection(), [8.0 * 0.99**step for step in range(500)])
    guard_after(GuardSection(), [0.01 * (step + 1) for step in range(500)])
    guard_after(GuardSection(), [1e-9, 1e9] * 10)  # nothing to judge by yet
    guard_after(GuardSection(deviations=None), [*[1.0] * 200, 1e9])


def test_a_norm_that_rises_and_stays_is_a_new_level_and_a_loss_that_does_is_not():
    guard = guard_after(GuardSection(), [1.0] * 100)
    verdicts = [guard.judge(100 + n, 1.0, norm)[0] for n, norm in enumerate([8.0, 9.0, 8.5, 8.0, 30.0, 25.0])]
    assert verdicts == [SKIP] * 3 + [APPLY] * 3  # and there is nothing yet to judge the next norms by
    guard = guard_after(GuardSection(), [1.0] * 100)
    # Interrupted, wild, or with a loss to match: spikes.
    for batch, (loss, norm) in enumerate(
        [(1, 8), (1, 9), (1, 8), (1, 1), (1, 8), (1, 80), (1, 8), (1, 80), (8, 8)], 100
    ):
        assert guard.judge(batch, loss, norm)[0] == (APPLY if norm == 1 else SKIP)
    assert [guard.judge(batch, 8.0, 8.0)[0] for batch in range(400, 409)] == [SKIP] * 8 + [ROLL_BACK]


def test_a_state_in_the_middle_of_a_rise_goes_on():
    guard = guard_after(GuardSection(), [1.0] * 100)
    assert [guard.judge(batch, 1.0, 9.0)[0] for batch in (100, 101)] == [SKIP, SKIP]
    again = Guard(GuardSection())
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert [again.judge(batch, 1.0, 9.0)[0] for batch in (102, 103)] == [SKIP, APPLY]


def test_sources_are_judged_by_themselves():
    draw, guard = random.Random(5), Guard(GuardSection())
    for batch in range(2000):
        source = batch > 500 and draw.random() < 0.2  # one that comes later
        assert guard.judge(batch, *[draw.gauss(1, 0.05) * (9 if source else 1)] * 2, int(source))[0] == APPLY
    assert guard.judge(2000, 9.0, 9.0, 0)[0] == SKIP and guard.judge(2001, 9.0, 9.0, 1)[0] == APPLY
    guard.start_afresh()
    assert guard.judge(2002, 90.0, 90.0, 0)[0] == APPLY and guard.skipped == []


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_is_always_seen(bad):
    guard = guard_after(GuardSection(deviations=None))
    assert guard.judge(0, bad, 1.0)[0] == SKIP
    assert guard.judge(1, 1.0, bad)[0] == SKIP
    json.loads(json.dumps(guard.state_dict(), allow_nan=False))


def test_budgets_escalate_and_survive_a_round_trip():
    settings = GuardSection(window=8, skips=2, margin=3, rollbacks=1)
    guard = guard_after(settings, [1.0] * 10)
    earlier = json.loads(json.dumps(guard.state_dict()))
    verdicts = [guard.judge(batch, NAN, 1.0)[0] for batch in (10, 11, 12)]
    assert verdicts == [SKIP, SKIP, ROLL_BACK] and guard.first_suspect == 7
    guard.roll_back(earlier)
    again = Guard(settings)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.passed_over == [[7, 12]] and again.skipped == [] and len(again.applied["0"]) == 8
    stream = again.batches(5)
    assert [next(stream) for _ in range(4)] == [5, 6, 13, 14]
    assert [again.judge(batch, NAN, 1.0)[0] for batch in (13, 14, 15)] == [SKIP, SKIP, STOP]
    # Skips that lie far apart are no trouble.
    calm = guard_after(settings)
    for batch in range(0, 100, 10):
        assert calm.judge(batch, NAN, 1.0)[0] == SKIP


def poison(batches) -> str:
    """Makes the loss of these batches NaN, on rank 1 alone."""
    return f"""
inner = train.forward_backward
def forward_backward(engine, batch, total_loss, seed):
    if rank == 1 and seed.args[1] in {batches}:
        def poisoned(*a, **k):
            loss, parts = total_loss(*a, **k)
            return loss * float("nan"), parts
        return inner(engine, batch, poisoned, seed)
    return inner(engine, batch, total_loss, seed)
train.forward_backward = forward_backward
"""


PASS_OVER = """
class Guard(train.Guard):
    def __init__(self, settings):
        super().__init__(settings)
        self.passed_over = [[0, 0], [2, 3]]
train.Guard = Guard
"""


def events(run, name):
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == name]


@pytest.mark.parametrize(
    ("stage", "chunks"),
    [(0, []), (1, []), (3, []), *((stage, ["engine.chunk_tokens=500"]) for stage in (1, 2, 3))],
    ids=["0", "1", "3", "1 chunks", "2 chunks", "3 chunks"],
)
def test_a_skipped_batch_leaves_no_trace_in_weights_and_optimizer(stage, chunks, tmp_path, shards, forks: Forks):
    """The first batch of all, one in the middle, and two in a row, on two ranks of which one saw the NaN."""
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), engine=zero(stage), run={"steps": 3})
    skipping, never = tmp_path / "skipping", tmp_path / "never"
    job = forks.train(2, recipe, *chunks, f"run.folder={skipping}", patch=poison({0, 2, 3}))
    assert job.codes == [0, 0], job.output
    assert [one["batch"] for one in events(skipping, "skipped")] == [0, 2, 3]
    assert events(skipping, "skipped")[0]["reason"] == "the loss is not finite"
    job = forks.train(2, recipe, *chunks, f"run.folder={never}", patch=PASS_OVER)
    assert job.codes == [0, 0], job.output
    assert events(never, "skipped") == []
    assert facts(skipping) == facts(never) and facts(never)[3][-1] == 6
    assert checksums(skipping, 3) == checksums(never, 3)


BUDGET = {"window": 8, "skips": 1, "margin": 1, "rollbacks": 1}


def test_trouble_rolls_back_passes_over_and_is_told(tmp_path, shards, forks: Forks):
    run = {"steps": 8, "log_every": 1, "checkpoint_every": 2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards("mds"), run=run, guard=BUDGET, engine={"zero_stage": 2}, data={"workers": 1}
    )
    job = forks.train(2, recipe, patch=poison({5, 6}))
    assert job.codes == [0, 0], job.output
    run = tmp_path / "run"
    assert [one["step"] for one in events(run, "rollback")] == [4]
    # Batch 4 is the margin; the state of step 4 had seen batches 0 to 3.
    assert [one[-1] for one in facts(run).values()] == [1, 2, 3, 4, 8, 9, 10, 11]
    manifest = json.loads((run / "checkpoints" / "step-00000008.json").read_text())
    assert manifest["state"]["guard"]["passed_over"] == [[4, 6]] and manifest["state"]["batch"] == 11
    assert "batch 5 is skipped: the loss is not finite" in job.output
    # A run whose plan never had these batches has the same weights.
    never = forks.train(2, recipe, f"run.folder={tmp_path}/never", patch=PASS_OVER.replace("[0, 0], [2, 3]", "[4, 6]"))
    assert never.codes == [0, 0], never.output
    assert checksums(run, 8) == checksums(tmp_path / "never", 8)


def test_trouble_without_end_ends_with_a_post_mortem(tmp_path, shards, forks: Forks):
    run = {"steps": 20, "log_every": 1, "checkpoint_every": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run=run, guard=BUDGET)
    job = forks.train(2, recipe, patch=poison(set(range(5, 99))))
    assert job.codes[0] == 1 and job.codes[1] != 0, job.output
    (line,) = {line for line in job.output.splitlines() if line.startswith("error: ")}  # of each rank
    assert "the loss is not finite" in line and "post-mortem.json" in line and "Traceback" not in job.output
    report = json.loads((tmp_path / "run" / "post-mortem.json").read_text())
    assert report["passed_over"] == [[4, 6]] and [bad["batch"] for bad in report["not_applied"]] == [7, 8]
    assert all(len(bad["documents"]) == 8 and bad["loss"] == "nan" for bad in report["not_applied"])
    document = report["not_applied"][0]["documents"][0]
    assert isinstance(document["id"], str) and len(document["languages"]) == 2
    assert [one["batch"] for one in report["last_applied"]] == [0, 1, 2, 3]
    assert events(tmp_path / "run", "gave_up")
    assert (tmp_path / "run" / "checkpoints" / "step-00000004.json").exists()


def test_trouble_before_the_first_checkpoint_ends_at_once(tmp_path, shards, forks: Forks):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards("mds"), run={"steps": 9}, guard=BUDGET)
    job = forks.train(2, recipe, patch=poison({1, 2}))
    assert job.codes[0] == 1 and "no checkpoint is from before batch 0" in job.output, job.output
