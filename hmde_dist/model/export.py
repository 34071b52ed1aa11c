"""Building, saving and loading the encoder: from a recipe, and as a folder that needs nothing of this project.

An exported folder holds safetensors, the tokenizer, and the model's own source files, flattened, so that
`AutoModel.from_pretrained(..., trust_remote_code=True)` and `SentenceTransformer(..., trust_remote_code=True)` load it
anywhere.
"""

import difflib
import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from hmde_dist.command import InputError, output_folder
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.longformer import longformer_config, longformer_weights
from hmde_dist.model.model_card import model_card
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.model.packed_attention import first_position
from hmde_dist.recipe import ModelSection
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.sliding_windows import SlidingWindows

PACKAGE = Path(__file__).parent.parent
BUNDLE = (
    "corpus/sentences.py",
    "corpus/text.py",
    "stream/batch.py",
    "stream/sliding_windows.py",
    "model/configuration_hmde.py",
    "model/packed_attention.py",
    "model/document_encoder.py",
    "model/modeling_hmde.py",
    "model/sentence_transformer.py",
)


def build_model(
    recipe: ModelSection,
    index: ShardIndex,
    sentences: int,
    scale: float,
    seed: int,
    windows: SlidingWindows | None = None,
) -> HMDEModel:
    """The model of a recipe before its first step: the same weights for the same seed, everywhere.

    Args:
        index: the shard set it will read; gives vocabulary and sentence length.
        sentences: segments of a document that are encoded.
        scale: of the cosine in the loss, recorded in the configuration.
        windows: what a document is cut into; none = its sentences.

    Raises:
        InputError: no such pretrained encoder, or one whose vocabulary or positions are too small for the shards.
    """
    manifest = index.manifest
    lower = recipe.lower
    pretrained = None
    if lower.pretrained:
        try:
            pretrained = AutoModel.from_pretrained(lower.pretrained, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(
                f"model.lower.pretrained: no encoder at {lower.pretrained}: {str(error).splitlines()[0]}"
            ) from None
        lower_config = pretrained.config
    else:
        special = manifest["special_ids"]
        settings = lower_settings(lower.config) | {
            "vocab_size": manifest["vocabulary"],
            "pad_token_id": special["pad"],
            "bos_token_id": special["cls"],
            "cls_token_id": special["cls"],
            "eos_token_id": special["sep"],
            "sep_token_id": special["sep"],
        }
        try:
            lower_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (ValueError, KeyError) as error:
            raise InputError(f"model.lower.config: {str(error).splitlines()[0][:200]}") from None
    if lower.longformer:
        try:
            lower_config = longformer_config(
                lower_config, lower.longformer.attention_window, lower.longformer.positions
            )
        except ValueError as error:
            raise InputError(f"model.lower.longformer: {error}") from None
    if lower_config.vocab_size < manifest["vocabulary"]:
        raise InputError(
            f"the sentence encoder has {lower_config.vocab_size} tokens, the shards {manifest['vocabulary']}: "
            "build the shards with the encoder's own tokenizer"
        )
    if recipe.upper.layers and lower_config.hidden_size % recipe.upper.heads:
        raise InputError(f"model.upper.heads={recipe.upper.heads} does not divide the width {lower_config.hidden_size}")
    if recipe.upper.positions == "rotary" and lower_config.hidden_size // recipe.upper.heads % 2:
        raise InputError(
            f"model.upper.positions=rotary needs heads of even width: {recipe.upper.heads} heads give odd ones"
        )
    # Training starts in fp32 whatever the weights were stored in; bf16 is the engine's business.
    described = {key: value for key, value in lower_config.to_dict().items() if key not in ("dtype", "torch_dtype")}
    config = HMDEConfig(
        lower=described,
        hidden_size=lower_config.hidden_size,
        lower_source=lower.pretrained or "",
        sentence_pooling=lower.pooling,
        upper_layers=recipe.upper.layers,
        upper_heads=recipe.upper.heads,
        upper_intermediate=recipe.upper.intermediate,
        upper_dropout=recipe.upper.dropout,
        upper_positions=recipe.upper.positions,
        document_pooling=recipe.upper.pooling,
        segments=vars(windows) if windows else None,
        max_sentences=sentences,
        sentence_tokens=manifest["sentence_tokens"],
        scale=scale,
        languages=list(index.languages),
        mask_token_id=manifest["special_ids"].get("mask"),
    )
    try:
        model = untrained_model(config, seed, pretrained)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"model.lower: no encoder can be built from these settings ({error})") from None
    _check_positions(model)
    return model


def _check_positions(model: HMDEModel) -> None:
    config, windows = model.config, model.windows
    positions = config.lower.get("max_position_embeddings")
    tokens = windows.window if windows else config.sentence_tokens
    needed = tokens + 2 + first_position(model.lower)
    if positions is not None and positions < needed:
        segments, setting = (
            ("windows", "data.segments.window") if windows else ("sentences", "--sentence-tokens of the shards")
        )
        raise InputError(
            f"the sentence encoder has {positions} positions, {segments} of {tokens} tokens need {needed}: raise them "
            f"(max_position_embeddings, or positions of model.lower.longformer) or lower {setting}"
        )


def lower_settings(given: dict) -> dict:
    """The settings of `model.lower.config`, checked against the names that its model type knows.

    Raises:
        InputError: an unknown model type, an unknown name, or one that the shards decide.
    """
    try:
        known = AutoConfig.for_model(given["model_type"])
    except (ValueError, KeyError) as error:
        raise InputError(f"model.lower.config: {str(error).splitlines()[0][:200]}") from None
    if not hasattr(known, "hidden_size"):
        raise InputError(f"model.lower.config: {given['model_type']} is no encoder with a hidden_size")
    names = set(known.to_dict()) | set(known.attribute_map)
    for name in given:
        if name in ("vocab_size", "pad_token_id"):
            raise InputError(f"model.lower.config.{name}: the tokenizer of the shards decides this; leave it out")
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            raise InputError(
                f"model.lower.config.{name}: {given['model_type']} has no such setting"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
    return dict(given)


def untrained_model(config: HMDEConfig, seed: int, pretrained: torch.nn.Module | None = None) -> HMDEModel:
    """A model as training begins it: fresh weights by `seed`, those of `config.lower_source` in the sentence encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HMDEModel(config)
    if pretrained is None and config.lower_source:
        pretrained = AutoModel.from_pretrained(config.lower_source, dtype=torch.float32)
    if pretrained is not None:
        weights = pretrained.state_dict()
        if model.lower.config.model_type == "longformer" and pretrained.config.model_type != "longformer":
            weights = longformer_weights(pretrained, model.lower)
        missing, _ = model.lower.load_state_dict(weights, strict=False)
        assert not missing, missing
    return model


def save_description(model: HMDEModel, index: ShardIndex, folder: Path) -> None:
    """Configuration and tokenizer, so that a checkpoint can be exported without the shards it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    load_tokenizer(index.folder / "tokenizer").save_pretrained(folder)


def save_model(model: HMDEModel, tokenizer, out: str | Path, card: str = "") -> None:
    """Write `model` as a self-contained folder `out` (fp32 safetensors, tokenizer, source files).

    Args:
        card: its README; "" = one that knows the configuration only.
    """
    with output_folder(out) as folder:
        config = model.config
        config.auto_map = {"AutoConfig": "configuration_hmde.HMDEConfig", "AutoModel": "modeling_hmde.HMDEModel"}
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for source in BUNDLE:
            text = (PACKAGE / source).read_text(encoding="utf-8")
            text = re.sub(r"from hmde_dist\.(?:\w+\.)*(\w+) import", r"from .\1 import", text)
            (folder / Path(source).name).write_text(text, encoding="utf-8")
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformer.HMDEModule"}]
        (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n", encoding="utf-8")
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({"similarity_fn_name": "cosine"}, indent=1) + "\n", encoding="utf-8"
        )
        (folder / "README.md").write_text(card or model_card(config), encoding="utf-8")


def load_model(folder: str | Path) -> HMDEModel:
    """The model of an exported folder, in evaluation mode, on the best device here.

    Uses this package's classes, not the code inside the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder}: no exported model (config.json and model.safetensors); make one with tools/export.py"
        )
    config = HMDEConfig.from_pretrained(folder)
    if config.model_type != "hmde":
        raise InputError(f"{folder}: a model of type {config.model_type}, expected one exported by tools/export.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HMDEModel.from_pretrained(folder).eval().to(device)
