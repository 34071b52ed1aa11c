"""The cluster, one for each process of the tests, and the runs that nothing interrupted."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from launch import journal, train, write_recipe

STEPS = 60


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4)
    yield cluster
    cluster.stop()


@pytest.fixture
def recipe(tmp_path, shards) -> Path:
    """A training that ends by itself after `STEPS` steps and saves every third; dropout on, ZeRO 1."""
    return write_recipe(
        tmp_path / "recipe.yaml",
        shards("mds"),
        model={"upper": {"layers": 1, "heads": 2, "intermediate": 64, "dropout": 0.3}},
        engine={"zero_stage": 1},
        run={"folder": str(tmp_path / "run"), "steps": STEPS, "log_every": 1, "checkpoint_every": 3},
    )


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Callable[[Path, int], list[tuple]]:
    """`uninterrupted(recipe, ranks)`: the facts of every step of a run that torchrun started and nothing stopped."""
    made: dict[int, list[tuple]] = {}

    def run(recipe: Path, ranks: int) -> list[tuple]:
        if ranks not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            job = train(ranks, recipe, f"run.folder={folder}")
            assert job.code == 0, job.output
            made[ranks] = facts(folder)
            assert [step for step, *_ in made[ranks]] == list(range(1, STEPS + 1))
        return made[ranks]

    return run


def facts(run: Path) -> list[tuple]:
    """What a step of the same run must repeat bit for bit; of a step that was done twice the later line counts."""
    names = ("step", "loss", "grad_norm", "tokens", "documents", "learning_rate")
    steps = {record["step"]: tuple(record[name] for name in names) for record in journal(run)}
    return [steps[step] for step in sorted(steps)]
