"""Every recipe of the repository: it says what it is for, can be planned, and trains two steps on two ranks at reduced size."""

from pathlib import Path

import numpy as np
import pytest
from vector_folders import write_vectors

from hmde_dist.corpus.readers import read_documents
from hmde_dist.preflight import print_plan
from hmde_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PATHS = sorted(RECIPES.rglob("*.yaml"))
TINY = (
    "{model_type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, "
    "max_position_embeddings: 40}"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


@pytest.fixture(scope="module")
def teacher(small_corpus, tmp_path_factory) -> Path:
    documents = [(document.id, document.lang) for document in read_documents([small_corpus])]
    rows = np.random.default_rng(0).normal(size=(len(documents), 16)).astype(np.float32)
    return write_vectors(tmp_path_factory.mktemp("teacher") / "vectors", rows, documents=documents)


def reduced(path: Path, shards: Path, teacher: Path) -> list[str]:
    """Overrides that leave the method as it is and make everything small; no recipe's data or pretrained weights are here."""
    recipe = load_recipe(path)
    banks = [f"objectives.{n}.bank=8" for n, one in enumerate(recipe.objectives) if hasattr(one, "bank")]
    taught = [f"objectives.{n}.width=16" for n, one in enumerate(recipe.objectives) if one.needs_teacher]
    taught += [f"data.teacher={teacher}"] if recipe.data.teacher else []
    chunks = ["engine.chunk_tokens=400"] if recipe.engine.chunk_tokens else []
    chunks += ["model.lower.unfreeze_at_step=1"] if recipe.model.lower.unfreeze_at_step else []
    short = ["data.segments={window: 30, stride: 20}"] if recipe.data.segments else []
    short += ["model.lower.longformer.attention_window=8"] if recipe.model.lower.longformer else []
    return [
        f"data.shards={shards}", "data.validation=null", "data.pairs_per_batch=8", "data.sentences=6", "data.workers=0",
        "model.lower.pretrained=null", f"model.lower.config={TINY}", "model.upper.heads=2", "model.upper.intermediate=32",
        "engine.self_test=true", "run.steps=2", "run.log_every=1", "run.best_metric=null", "optimizer.warmup_steps=0", *banks, *taught, *chunks, *short,
    ]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_it_loads_and_says_what_it_is_for(path):
    load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent == RECIPES], ids=name_of)
def test_it_is_planned_and_trains_two_steps_on_two_ranks(path, shards, teacher, tmp_path, forks, capsys):
    overrides = [*reduced(path, shards("mds"), teacher), f"run.folder={tmp_path}/run"]
    print_plan(load_recipe(path, overrides), 2, "H100")
    assert "parameters" in capsys.readouterr().out
    job = forks.train(2, path, *overrides)
    assert job.codes == [0, 0], job.output


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent != RECIPES], ids=name_of)
def test_more_nodes_see_as_many_documents_in_batches_that_every_gpu_has_a_share_of(path):
    nodes = int(path.parent.name.removesuffix("nodes"))
    recipe, one = load_recipe(path), load_recipe(RECIPES / path.name)
    assert recipe.data.pairs_per_batch % (8 * nodes) == 0
    assert recipe.run.folder != one.run.folder
    assert recipe.run.steps * recipe.data.pairs_per_batch == pytest.approx(
        one.run.steps * one.data.pairs_per_batch, rel=0.01
    )
    unfrozen, of_one = (r.model.lower.unfreeze_at_step for r in (recipe, one))
    assert (unfrozen or 0) / recipe.run.steps == pytest.approx((of_one or 0) / one.run.steps)
    lower = recipe.model.lower.model_copy(update={"unfreeze_at_step": of_one})
    assert (recipe.model.model_copy(update={"lower": lower}), recipe.objectives) == (one.model, one.objectives)
