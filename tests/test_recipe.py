import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.recipe import dump_recipe, load_recipe, setting_names

BASE = {
    "data": {"shards": "shards", "pairs_per_batch": 8},
    "model": {"lower": {"config": {"model_type": "bert", "hidden_size": 32}}},
    "optimizer": {"learning_rate": 0.001},
    "run": {"folder": "run", "steps": 100},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("recipe") / "base.yaml", BASE)


def write(path: Path, tree) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as refused:
        load_recipe(path, list(overrides))
    return str(refused.value)


def test_dumped_recipe_spells_everything_out_and_loads_as_the_same(base, tmp_path):
    recipe = load_recipe(base)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    tree = yaml.safe_load(dump_recipe(recipe))
    assert tree["engine"]["zero_stage"] == 1
    for name in setting_names():
        node = tree
        for key in name.split("."):
            assert key in node, name
            node = node[key]


def test_misspelt_setting_names_the_nearest(base):
    message = refusal(base, "engine.zero_stge=2")
    assert message == "engine.zero_stge: no such setting; did you mean engine.zero_stage?"


@given(st.sampled_from([name for name in setting_names() if "." in name]), st.data())
def test_one_slip_of_the_pen_is_understood(base, name, data):
    section, _, key = name.rpartition(".")
    place = data.draw(st.integers(0, len(key) - 1))
    slip = data.draw(st.sampled_from(["", key[place] * 2, "x", "_"]))
    misspelt = f"{section}.{key[:place]}{slip}{key[place + 1 :]}"
    if misspelt in setting_names() or misspelt.endswith("."):
        return
    assert f"{misspelt}: no such setting; did you mean {name}?" in refusal(base, f"{misspelt}=1")


def test_setting_without_its_section_is_understood(base):
    assert "did you mean optimizer.learning_rate?" in refusal(base, "learning_rate=1")


def test_setting_that_resembles_nothing_gets_no_guess(base):
    assert refusal(base, "zzz=1") == "zzz: no such setting"


def test_all_problems_come_in_one_message(base):
    message = refusal(base, "engine.zero_stage=4", "data.sentences=0", "modle.x=1", "run.resume=maybe")
    for problem in (
        "engine.zero_stage: Input should be less than or equal to 3 (given: 4)",
        "data.sentences: Input should be greater than or equal to 1 (given: 0)",
        "modle: no such setting; did you mean model?",
        "run.resume: Input should be 'auto', 'must' or 'never' (given: 'maybe')",
    ):
        assert problem in message
    assert message.count(";") == 4


def test_problems_between_settings_come_in_one_message(base):
    message = refusal(base, "data.neighbour_group=9", "optimizer.warmup_steps=101")
    assert "data.neighbour_group is larger than data.pairs_per_batch / data.pairs_per_group" in message
    assert "optimizer.warmup_steps is larger than run.steps" in message


def test_problems_of_overrides_come_with_the_others(base):
    message = refusal(base, "run.steps", "engine.zero_stge=2")
    assert 'override "run.steps": write section.key=value' in message
    assert "did you mean engine.zero_stage?" in message


def test_missing_settings_are_named(tmp_path):
    message = refusal(write(tmp_path / "empty.yaml", {"run": {}}))
    assert message == "data: missing; model: missing; optimizer: missing; run.folder: missing; run.steps: missing"


@pytest.mark.parametrize(
    "overrides",
    [["model.lower.pretrained=x"], ["model.lower.config=null"]],
    ids=["both", "none"],
)
def test_lower_encoder_has_exactly_one_source(base, overrides):
    assert refusal(base, *overrides) == "model.lower: set exactly one of pretrained and config"


def test_override_can_swap_the_source(base):
    lower = load_recipe(base, ["model.lower.config=null", "model.lower.pretrained=xlm-roberta-base"]).model.lower
    assert (lower.pretrained, lower.config) == ("xlm-roberta-base", None)


def test_configuration_without_type_is_refused(tmp_path):
    tree = BASE | {"model": {"lower": {"config": {"hidden_size": 32}}}}
    assert refusal(write(tmp_path / "r.yaml", tree)) == 'model.lower: config needs model_type, such as "bert"'


def test_overrides_take_the_types_of_yaml(base):
    recipe = load_recipe(
        base,
        [
            "optimizer.learning_rate=1e-3",
            "optimizer.betas=[0.8, 0.95]",
            "objectives.0.trainable_scale=true",
            "data.validation=a=b",
            "model.lower.config.num_hidden_layers=3",
        ],
    )
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.optimizer.betas == (0.8, 0.95)
    assert recipe.objectives[0].trainable_scale is True
    assert recipe.data.validation == "a=b"
    assert recipe.model.lower.config == {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 3}


def test_last_override_wins(base):
    assert load_recipe(base, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("run.steps.more=3", "steps is a value, not a section"),
        ("run.steps=[", "the value is not YAML"),
    ],
)
def test_malformed_override(base, override, message):
    assert refusal(base, override) == f'override "{override}": {message}'


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=many",
        "run.steps=1.5",
        "run.steps=true",
        "objectives.0.scale=true",
        "optimizer.learning_rate=.nan",
        "optimizer.learning_rate=.inf",
        "optimizer.learning_rate=0",
        "engine=",
        "data.validation=3",
        "model.lower.config=bert",
        "data.language_temperature=1.1",
    ],
)
def test_wrong_value_is_named(base, override):
    name, _, _ = override.partition("=")
    assert refusal(base, override).startswith(f"{name}: ")


def test_sections_of_an_extended_recipe_merge(base, tmp_path):
    middle = write(tmp_path / "a" / "middle.yaml", {"extends": str(base), "run": {"seed": 3}, "data": {"workers": 0}})
    top = write(tmp_path / "top.yaml", {"extends": f"a/{middle.name}", "run": {"steps": 7}})
    recipe = load_recipe(top)
    assert (recipe.run.seed, recipe.run.steps, recipe.data.workers) == (3, 7, 0)
    assert recipe.data.pairs_per_batch == 8


@pytest.mark.parametrize("extends", ["loop.yaml", "./loop.yaml", "../here/loop.yaml", "other.yaml"])
def test_recipe_that_extends_itself(tmp_path, extends):
    loop = write(tmp_path / "here" / "loop.yaml", {"extends": extends})
    write(tmp_path / "here" / "other.yaml", {"extends": "loop.yaml"})
    assert "extends itself" in refusal(loop)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"extends: nowhere.yaml", "nowhere.yaml: no such recipe"),
        (b"extends: [a.yaml]", "extends"),
        (b"- a", "expected sections such as data: and model:"),
        (b"run: {steps: 1", "not YAML"),
        (b"run: \xff", "not YAML"),
        (b"run: !!python/object/apply:os.system [x]", "not YAML"),
    ],
)
def test_unreadable_recipe_is_named(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert re.match(f"{re.escape(str(tmp_path))}/.*{re.escape(message)}", refusal(path), re.DOTALL)


def test_folder_is_no_recipe(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)


def test_a_recipe_cannot_be_changed(base):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(base).run.steps = 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shards=[{shard: a}]"], "data.shards.0.shard: no such setting; did you mean data.shards.shards?"),
        (["data.shards=[]"], "data.shards: List should have at least 1 item"),
        (["data.shards=[{shards: a, weight: {}}]"], "at least 1 item"),
        (["data.shards=[{shards: a, weight: -1}]"], "greater than 0"),
        (["data.shards=s3://bucket/set"], "data.cache must name a folder"),
        (["data.cache=somewhere"], "data.cache is for shards behind a URL, and there are none"),
        (["data.cache_limit_gib=3"], "data.cache_limit_gib limits data.cache, which is not set"),
        (["engine.zero3_persistence=3"], "acts with engine.zero_stage=3 only"),
    ],
)
def test_what_cannot_act_is_refused(base, overrides, message):
    assert message in refusal(base, *overrides)


def test_sources_have_weights_that_may_change(base):
    recipe = load_recipe(base, ["data.shards=[{shards: a}, {shards: b, weight: {0: 1, 500: 0}}]"])
    assert [source.weight for source in recipe.data.sources] == [1.0, {0: 1.0, 500: 0.0}]
    (single,) = load_recipe(base).data.sources
    assert (single.shards, single.weight) == ("shards", 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.upper.layers=0"], "model.upper: without layers nothing reaches [DCLS]: set pooling to mean or max"),
        (
            ["model.upper={layers: 0, pooling: mean}", "model.lower.frozen=true"],
            "model: lower.frozen with upper.layers 0 leaves nothing to train",
        ),
        (
            ["model.upper={layers: 0, pooling: mean}", "objectives=[{name: masked_sentence}]"],
            "objectives: masked_sentence needs a document encoder: set model.upper.layers to 1 or more",
        ),
        (
            ["model.upper={layers: 0, pooling: mean}", "objectives=[{name: contextual_sentence}]"],
            "objectives: contextual_sentence needs a document encoder: set model.upper.layers to 1 or more",
        ),
        *(
            (
                ["data.segments={window: 10, stride: 5}", f"objectives=[{one}]"],
                f"objectives: {one[7:-1].partition(',')[0]} aligns sentences, which windows are not: leave data.segments out",
            )
            for one in (
                "{name: sentence_alignment}",
                "{name: sentence_similarity}",
                "{name: contextual_sentence, queries: aligned}",
                "{name: translation_tokens}",
            )
        ),
        (["data.segments={window: 10, stride: 11}"], "data.segments: stride 11 is larger than window 10"),
        (["data.segments={window: 10}"], "data.segments.stride: missing"),
        (
            ["data.segments={window: 10, strid: 5}"],
            "data.segments.strid: no such setting; did you mean data.segments.stride?",
        ),
    ],
)
def test_segments_and_pooling_that_cannot_work_are_refused(base, overrides, message):
    assert message in refusal(base, *overrides)
