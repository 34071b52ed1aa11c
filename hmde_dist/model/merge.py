"""Merging: one model whose weights lie between those of several that were trained from one beginning.

The mean of checkpoints or models (Wortsman et al. 2022, arXiv 2203.05482), or spherical interpolation of two. Models that
differ in architecture or tokenizer are refused: their weights mean different things. All arithmetic is in fp64.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hmde_dist.command import InputError
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import load_model, save_model
from hmde_dist.model.model_card import model_card

Weights = dict[str, torch.Tensor]

SMALL_ANGLE = 1e-4  # radians; nearer ones, and opposite ones, are interpolated in a straight line
# What may differ between models that are merged, and how it is settled: by `merged_config`.
SETTLED = ("scale", "languages", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map")


def mean(models: Iterable[Weights]) -> Weights:
    """The mean of each tensor; one model is held at a time beside the sum.

    Raises:
        InputError: tensors of other names or shapes, or integers that differ.
    """
    total: Weights = {}
    count = 0
    for weights in models:
        count += 1
        total = total or {name: torch.zeros_like(t, dtype=torch.float64) for name, t in weights.items()}
        _check_alike(total, weights)
        for name, tensor in weights.items():
            total[name] += tensor
    return {name: _like(tensor / count, weights[name]) for name, tensor in total.items()}


def slerp(one: Weights, other: Weights, weight: float) -> Weights:
    """Each tensor of `one` turned towards that of `other` by the share `weight` of the angle between them; norms in a
    straight line (Shoemake 1985).

    Raises:
        InputError: as `mean`.
    """
    _check_alike(one, other)
    return {name: _like(_slerp(t.double(), other[name].double(), weight), t) for name, t in one.items()}


def _slerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    norms = a.norm(), b.norm()
    if not all(norms):
        return torch.lerp(a, b, weight)
    unit_a, unit_b = a / norms[0], b / norms[1]
    # Of unit vectors; exact at small angles, where the arc cosine is not.
    angle = 2 * math.atan2(float((unit_a - unit_b).norm()), float((unit_a + unit_b).norm()))
    if angle < SMALL_ANGLE or math.pi - angle < SMALL_ANGLE:
        return torch.lerp(a, b, weight)
    direction = (math.sin((1 - weight) * angle) * unit_a + math.sin(weight * angle) * unit_b) / math.sin(angle)
    return direction * torch.lerp(*norms, weight)


def _like(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """`tensor` in the type of `original`; whole numbers are no weights and must not have moved."""
    result = tensor.to(original.dtype)
    if not original.is_floating_point() and not torch.equal(result, original):
        raise InputError("the models have buffers of whole numbers that differ: they cannot be merged")
    return result


def _check_alike(one: Weights, other: Weights) -> None:
    shapes = [{name: tuple(t.shape) for name, t in weights.items()} for weights in (one, other)]
    if differing := sorted(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n)):
        raise InputError(f"the models differ in the shape of {', '.join(differing[:3])}: they cannot be merged")


def merge_models(folders: Sequence[Path], out: Path, weight: float | None = None) -> None:
    """Merge exported models into the model folder `out`, with a card that says of what.

    Args:
        weight: of the second of two models, for `slerp`; None = the mean of all.

    Raises:
        InputError: no exported model, or models that differ in configuration or tokenizer.
    """
    config = merged_config(folders)
    states = (load_model(folder).cpu().state_dict() for folder in folders)
    weights = mean(states) if weight is None else slerp(next(states), next(states), weight)
    model = load_model(folders[0]).cpu()
    model.load_state_dict(weights)
    model.config = config
    how = (
        "the mean of the weights"
        if weight is None
        else f"spherical interpolation, {weight:g} of the way from the first"
    )
    parts = [f"`{folder.resolve().name}` (SHA-256 of its weights {_digest(folder)[:16]})" for folder in folders]
    save_model(model, load_tokenizer(folders[0]), out, model_card(config, merged=f"{how} of {', '.join(parts)}"))


def merged_config(folders: Sequence[Path]) -> HMDEConfig:
    """The configuration that all models share; the scale is the mean of theirs, the languages are those of all.

    Raises:
        InputError: they differ in more.
    """
    configs, tokenizers = [], []
    for folder in folders:
        configs.append(load_config(folder))
        tokenizers.append((folder / "tokenizer.json").read_bytes())
    first = configs[0].to_dict()
    for folder, config, tokenizer in zip(folders[1:], configs[1:], tokenizers[1:], strict=True):
        own = config.to_dict()
        if differing := [n for n in sorted(first | own) if n not in SETTLED and first.get(n) != own.get(n)]:
            said = ", ".join(f"{name} ({first.get(name)!r:.40} and {own.get(name)!r:.40})" for name in differing)
            raise InputError(
                f"{folders[0]} and {folder} differ in {said}: only models of one architecture can be merged"
            )
        if tokenizer != tokenizers[0]:
            raise InputError(f"{folders[0]} and {folder} have different tokenizers: they cannot be merged")
    config = configs[0]
    config.scale = sum(one.scale for one in configs) / len(configs)
    if all(one.languages is not None for one in configs):
        config.languages = sorted({language for one in configs for language in one.languages})
    else:
        config.languages = None
    return config


def load_config(folder: Path) -> HMDEConfig:
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
        raise InputError(f"{folder}: no exported model; make one with tools/export.py")
    return HMDEConfig.from_pretrained(folder)


def _digest(folder: Path) -> str:
    with open(folder / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
