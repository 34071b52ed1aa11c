"""Every setting, once: strict pydantic sections, YAML recipes with `extends`, dotted overrides.

A setting that is accepted acts; a name that is unknown is refused with the nearest valid one. All problems of a recipe
come in one message, before anything is read or started.
"""

import difflib
import importlib
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hmde_dist.command import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value, info: ValidationInfo):
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are no numbers here")
        return value


class SourceSection(Section):
    shards: str = Field(description="folder or URL of a shard set")
    weight: (
        Annotated[float, Field(gt=0)]
        | Annotated[dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]], Field(min_length=1)]
    ) = Field(
        1.0, description="share of the batches, relative to other sources; {step: weight, ...} goes in straight lines"
    )


class SegmentsSection(Section):
    window: Count = Field(description="tokens of a window, without special tokens")
    stride: Count = Field(description="tokens from the beginning of a window to that of the next")

    @model_validator(mode="after")
    def _whole(self) -> "SegmentsSection":
        if self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} is larger than window {self.window}: tokens between would not be read"
            )
        return self


class DataSection(Section):
    shards: Annotated[
        Annotated[str, Tag("one")] | Annotated[list[SourceSection], Field(min_length=1), Tag("several")],
        Discriminator(lambda value: "one" if isinstance(value, str) else "several"),
    ] = Field(description="folder or URL of training shards (tools/build_shards.py), or several sources with weights")
    validation: str | None = Field(None, description="folder or URL of validation shards; none = no validation")
    teacher: Path | None = Field(
        None, description="folder of document vectors to learn from, for the objective distillation (tools/encode.py)"
    )
    cache: Path | None = Field(None, description="folder that shards behind URLs are copied to; must be set for URLs")
    cache_limit_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="size of the cache of each shard set; the least recently used shards go first; none = no limit",
    )
    pairs_per_batch: Count = Field(description="document pairs of one global batch, over all ranks")
    sentences: Count = Field(32, description="most sentences encoded of a document, or windows if `segments` is set")
    segments: SegmentsSection | None = Field(
        None,
        description="{window: tokens, stride: tokens} = windows over all its tokens stand for a document's sentences",
    )
    neighbours_per_batch: Share = Field(
        0.5, description="share of a batch made of category neighbours (hard negatives)"
    )
    neighbour_group: Annotated[int, Field(ge=2)] = Field(4, description="documents of one category placed together")
    hard_negatives: Literal["none", "paper"] = Field(
        "none",
        description="paper = beside the neighbours, one document for each side of a pair, of a random group of a random "
        "category, in the side's language, as in HMDE",
    )
    language_temperature: Share = Field(
        0.3, description="languages, or language pairs, are drawn ~ count ** temperature; 1 = as in the data"
    )
    pairs_per_group: Count = Field(
        1,
        description="pairs of a batch that are versions of one document; more than 1 makes sense with "
        "`positives: group` (LAPCA)",
    )
    batch_languages: Literal["mixed", "one_pair"] = Field(
        "mixed", description="one_pair = all pairs of a global batch are in the same two languages"
    )
    window: Literal["first", "random"] = Field(
        "first", description="which `sentences` of a longer document: its first ones, or a run drawn anew each epoch"
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        1, description="loader processes of each rank; 0 = in the training process"
    )

    @property
    def sources(self) -> list[SourceSection]:
        """`shards` as sources."""
        return [SourceSection(shards=self.shards)] if isinstance(self.shards, str) else self.shards


class LongformerSection(Section):
    attention_window: Annotated[int, Field(ge=2, multiple_of=2)] = Field(
        512, description="tokens that a token sees, half of them to each side; the first token sees and is seen by all"
    )
    positions: Count = Field(4096, description="tokens of the longest segment, special ones included")


class LowerSection(Section):
    pretrained: str | None = Field(None, description="Hugging Face encoder by name or folder, with its weights")
    config: dict | None = Field(None, description="or a Hugging Face configuration, with model_type, for fresh weights")
    longformer: LongformerSection | None = Field(
        None, description="make a Longformer of that encoder (BERT, RoBERTa, XLM-R), its weights included"
    )
    pooling: Literal["cls", "mean"] = Field("cls", description="sentence vector: first state, or mean of all states")
    frozen: bool = Field(
        False,
        description="keep its weights: every sentence vector is computed once and only the document encoder trains",
    )
    unfreeze_at_step: Count | None = Field(None, description="train all weights from this step on; none = never")

    @model_validator(mode="after")
    def _one_source(self) -> "LowerSection":
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("set exactly one of pretrained and config")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('config needs model_type, such as "bert"')
        if self.unfreeze_at_step is not None and not self.frozen:
            raise ValueError("unfreeze_at_step needs frozen: true")
        return self

    def frozen_at(self, step: int) -> bool:
        """Whether optimizer step `step` (0-based) leaves the sentence encoder as it is."""
        return self.frozen and (self.unfreeze_at_step is None or step < self.unfreeze_at_step)


class UpperSection(Section):
    layers: Annotated[int, Field(ge=0)] = Field(
        2, description="0 = the document vector is the mean or max of the sentence vectors themselves"
    )
    heads: Count = 8
    intermediate: Count = Field(2048, description="width of the feed-forward layers")
    dropout: Share = 0.1
    positions: Literal["learned", "rotary"] = "learned"
    pooling: Literal["dcls", "mean", "max"] = Field(
        "dcls", description="document vector: state of [DCLS], or mean or maximum of all states"
    )

    @model_validator(mode="after")
    def _something_to_pool(self) -> "UpperSection":
        if not self.layers and self.pooling == "dcls":
            raise ValueError(
                "without layers nothing reaches [DCLS]: set pooling to mean or max, or layers to 1 or more"
            )
        return self


class ModelSection(Section):
    lower: LowerSection
    upper: UpperSection = UpperSection()

    @model_validator(mode="after")
    def _something_to_train(self) -> "ModelSection":
        if self.lower.frozen and not self.upper.layers:
            raise ValueError(
                "lower.frozen with upper.layers 0 leaves nothing to train: unfreeze, or set layers to 1 or more"
            )
        return self


class ObjectiveSection(Section):
    """What every objective has; its own settings stand beside it in `hmde_dist/objectives/<name>.py`."""

    needs_tokens: ClassVar[bool] = False  # what it reads of a batch is not only sentence vectors
    needs_layers: ClassVar[bool] = False  # of the document encoder
    needs_sentences: ClassVar[bool] = False  # windows that are cut across sentences will not do
    needs_teacher: ClassVar[bool] = False  # `data.teacher`, whose vectors have its `width`

    name: str = Field(description="a file of hmde_dist/objectives/")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="of its loss in the sum of all")


class OptimizerSection(Section):
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rate of each layer of the sentence encoder, relative to the layer above it"
    )
    schedule: Literal["linear", "constant"] = Field("linear", description="after warm-up: linear to zero, or constant")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="on matrices only, not on norms and biases")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global norm; 0 = off")


class EngineSection(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(1, description="what DeepSpeed ZeRO partitions over ranks")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the encoder's matrix products; parameters, gradients and losses are always fp32"
    )
    zero3_persistence: Annotated[int, Field(ge=0)] | None = Field(
        None, description="ZeRO-3 keeps parameters of fewer elements whole on every rank; none = 100,000"
    )
    chunk_tokens: Count | None = Field(
        None,
        description="tokens that a rank encodes at once, about; a larger batch is encoded in chunks, twice, with the same "
        "gradients (gradient cache); none = all at once",
    )
    self_test: bool = Field(
        True, description="at start, compare the gradient of one small step with that of a single process"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input for the backward pass and compute the rest again"
    )
    compile: bool = Field(False, description="torch.compile the layers of both encoders; needs a C++ compiler on a CPU")
    timeout_minutes: Count = Field(30, description="a collective that takes longer ends the run")


class GuardSection(Section):
    deviations: Annotated[float, Field(gt=0)] | None = Field(
        10.0,
        description="a step is not applied if its loss or gradient norm is above median + deviations * MAD of the last "
        "`window` applied steps (of the logarithms; a MAD of at least 0.1), or not finite; none = only if not finite",
    )
    window: Annotated[int, Field(ge=4)] = Field(128, description="steps; spikes are looked for after a quarter of them")
    skips: Annotated[int, Field(ge=0)] = Field(
        8, description="steps that may be skipped within `window` batches; one more rolls the run back"
    )
    margin: Annotated[int, Field(ge=0)] = Field(
        8, description="batches before the first skipped one that are passed over, too, after a rollback"
    )
    rollbacks: Annotated[int, Field(ge=0)] = Field(2, description="of the whole run; one more ends it")


class RunSection(Section):
    folder: Path = Field(description="run folder: configuration, journal, TensorBoard, checkpoints, export")
    steps: Count = Field(description="optimizer steps of the whole run")
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = Field(10, description="steps")
    validate_every: Annotated[int, Field(ge=0)] = Field(0, description="steps; 0 = only at the end")
    best_metric: Literal["R@1", "R@10", "MRR@10", "nDCG@10"] | None = Field(
        None,
        description="of validation: where it is highest so far a checkpoint is made, and kept until a better one is there; "
        "tools/export.py --best takes it",
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(0, description="steps; 0 = only at the end")
    keep_checkpoints: Count = Field(2, description="newest checkpoints that are kept")
    keep_every_hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of every so many hours the first checkpoint is kept for good; none = only the newest are kept",
    )
    resume: Literal["auto", "must", "never"] = Field("auto", description="go on from the run folder's last checkpoint")
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="after which the run saves and stops, to be resumed; none = no limit"
    )
    hang_minutes: Annotated[float, Field(gt=0)] | None = Field(
        10.0, description="without progress, after which the run ends and says which rank stands where; none = no watch"
    )


class Recipe(Section):
    data: DataSection
    model: ModelSection
    objectives: Annotated[list[SerializeAsAny[ObjectiveSection]], Field(min_length=1)] = Field(
        [{"name": "document_contrast"}], validate_default=True, description="losses that are added"
    )
    optimizer: OptimizerSection
    engine: EngineSection = EngineSection()
    guard: GuardSection = GuardSection()
    run: RunSection

    @field_validator("objectives", mode="before")
    @classmethod
    def _own_settings(cls, sections):
        """Each section as the settings class of the objective it names."""
        if not isinstance(sections, list):
            return sections
        problems, settings = [], []
        for number, one in enumerate(sections):
            try:
                settings.append(_objective_settings(one) if isinstance(one, dict) else one)
            except ValidationError as error:
                names = list(_settings_class(one).model_fields)
                problems += [f"objectives.{number}.{_explain(problem, names)}" for problem in error.errors()]
        if problems:
            raise ValueError("; ".join(problems))
        return settings

    @property
    def teacher_width(self) -> int | None:
        """Components of the teacher's vectors, if there is a teacher."""
        return next((one.width for one in self.objectives if one.needs_teacher), None)

    @property
    def scale(self) -> float:
        """Of the cosine, where an objective has one."""
        return next((one.scale for one in self.objectives if hasattr(one, "scale")), 1.0)

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        problems = []
        groups, left = divmod(self.data.pairs_per_batch, self.data.pairs_per_group)
        if left:
            problems.append("data.pairs_per_group does not divide data.pairs_per_batch")
        if self.data.neighbours_per_batch and self.data.neighbour_group > groups:
            problems.append("data.neighbour_group is larger than data.pairs_per_batch / data.pairs_per_group")
        if self.data.pairs_per_group > 1 and self.data.batch_languages == "one_pair":
            problems.append(
                "data.pairs_per_group acts with data.batch_languages=mixed only: a group has one pair of two"
            )
        sources = [s.shards for s in self.data.sources] + [self.data.validation or ""]
        if any("://" in source for source in sources) and self.data.cache is None:
            problems.append("data.cache must name a folder, for shards behind a URL are copied there")
        if self.data.cache is not None and not any("://" in source for source in sources):
            problems.append("data.cache is for shards behind a URL, and there are none")
        if self.data.cache_limit_gib is not None and self.data.cache is None:
            problems.append("data.cache_limit_gib limits data.cache, which is not set")
        if self.engine.zero3_persistence is not None and self.engine.zero_stage != 3:
            problems.append("engine.zero3_persistence acts with engine.zero_stage=3 only")
        if self.engine.compile and self.engine.zero_stage == 3:
            problems.append(
                "engine.compile does not go with engine.zero_stage=3, which fetches parameters by Python hooks"
            )
        if self.model.lower.frozen:
            problems += [
                f"objectives: {one.name} reads tokens, and with model.lower.frozen=true there are only sentence vectors"
                for one in self.objectives
                if one.needs_tokens
            ]
        taught = [one.name for one in self.objectives if one.needs_teacher]
        if taught and self.data.teacher is None:
            problems.append(
                f"objectives: {taught[0]} needs data.teacher, a folder of vectors made with tools/encode.py"
            )
        if self.data.teacher is not None and not taught:
            problems.append("data.teacher acts with the objective distillation only")
        for one in self.objectives:
            if one.needs_layers and not self.model.upper.layers:
                problems.append(f"objectives: {one.name} needs a document encoder: set model.upper.layers to 1 or more")
            if one.needs_sentences and self.data.segments:
                problems.append(
                    f"objectives: {one.name} aligns sentences, which windows are not: leave data.segments out"
                )
        if self.run.best_metric is not None and self.data.validation is None:
            problems.append("run.best_metric needs data.validation")
        if self.optimizer.warmup_steps > self.run.steps:
            problems.append("optimizer.warmup_steps is larger than run.steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def objective_names() -> list[str]:
    """The objectives there are: each is a file."""
    return [file.stem for file in sorted((Path(__file__).parent / "objectives").glob("*.py")) if _has_objective(file)]


def _has_objective(file: Path) -> bool:
    return "\nclass Settings(ObjectiveSection):" in file.read_text(encoding="utf-8")


def _objective_settings(section: dict) -> ObjectiveSection:
    """A section as the settings class of the objective it names."""
    return _settings_class(section).model_validate(section)


def _settings_class(section: dict) -> type[ObjectiveSection]:
    name = section.get("name")
    if name not in objective_names():
        raise ValueError(f"no objective {name!r}; there are {', '.join(objective_names())}")
    # Here and not above: the objectives import this module.
    return importlib.import_module(f"hmde_dist.objectives.{name}").Settings


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `extends` resolved and `section.key=value` overrides applied.

    Raises:
        InputError: every problem found, in one message.
    """
    tree = _read_tree(Path(path), ())
    tree.setdefault("objectives", [{"name": "document_contrast"}])  # so that overrides reach its settings
    problems = [f'override "{o}": {problem}' for o in overrides if (problem := _override(tree, o))]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(problem) for problem in error.errors()]
    if problems:
        raise InputError("; ".join(problems))
    return recipe


def _override(tree: dict, override: str) -> str | None:
    """Set `section.key=value` in `tree`; the problem, if there is one."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        return "write section.key=value"
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if isinstance(node, list):
            if not parent.isdecimal() or int(parent) >= len(node):
                return f"{parent} is no number from 0 to {len(node) - 1}"
            node = node[int(parent)]
        else:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            return f"{parent} is a value, not a section"
    if isinstance(node, list):
        return f"{last} is no setting: write {'.'.join(parents)}.NUMBER.setting"
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        return "the value is not YAML"
    return None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every setting spelt out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as data: and model:")
    parent = tree.pop("extends", None)
    if not isinstance(parent, str | None):
        raise InputError(f"{path}: extends must name one recipe")
    return _merge(_read_tree(path.parent / parent, (*seen, path.resolve())), tree) if parent else tree


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def setting_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted setting name."""
    names = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [prefix + name, *setting_names(inner, f"{prefix}{name}.")]
        else:
            names.append(prefix + name)
    return names


def _explain(problem: dict, names: list[str] | None = None) -> str:
    name = ".".join(str(part) for part in problem["loc"] if part not in ("one", "several")) or "recipe"
    if problem["type"] == "extra_forbidden":
        names = names or [
            *setting_names(),
            *setting_names(SourceSection, "data.shards."),
            *setting_names(SegmentsSection, "data.segments."),
            *setting_names(LongformerSection, "model.lower.longformer."),
        ]
        nearest = difflib.get_close_matches(re.sub(r"\.\d+\.", ".", name), names, n=1, cutoff=0.5)
        return f"{name}: no such setting" + (f"; did you mean {nearest[0]}?" if nearest else "")
    if problem["type"] == "missing":
        return f"{name}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith(f"{name}."):
        return message  # names the settings itself
    given = problem.get("input")
    return f"{name}: {message}" + (f" (given: {given!r})" if not isinstance(given, dict | BaseModel) else "")
