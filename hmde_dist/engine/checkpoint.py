"""Checkpoints: DeepSpeed's files, made real by a manifest that is renamed into place last.

    RUN/checkpoints/
      step-00000300/                  DeepSpeed's files of all ranks
      step-00000300.json              the manifest: step, counters, world, sizes; without it the folder does not exist

DeepSpeed's own `latest` is neither written nor read: it is set while other ranks still write.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hmde_dist.command import InputError, output_file
from hmde_dist.recipe import Recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.plan import PLAN_VERSION
from hmde_dist.topology import World


def save_checkpoint(engine, folder: Path, state: dict, keep: int, world: World) -> Path:
    """Write the checkpoint of `state["step"]` on all ranks; returns its manifest's path. A collective.

    Args:
        state: plain data, written into the manifest.
        keep: newest checkpoints that stay.
    """
    tag = f"step-{state['step']:08d}"
    manifest = folder / f"{tag}.json"
    if world.is_first:
        _remove(folder / tag)
    world.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    world.barrier()
    if world.is_first:
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted((folder / tag).rglob("*")) if p.is_file()}
        with output_file(manifest) as file:
            json.dump(
                state | {"world": world.size, "zero_stage": engine.zero_optimization_stage(), "files": files},
                file,
                indent=1,
            )
        for old in checkpoints(folder)[:-keep]:
            _remove(folder / old.stem)
    world.barrier()
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Manifests of the complete checkpoints, oldest first; one whose files are missing or cut is not complete."""
    complete = []
    for manifest in sorted(Path(folder).glob("step-*.json")):
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()):
            complete.append(manifest)
    return complete


def restore(engine, folder: Path, recipe: Recipe, identity: dict, world: World) -> dict | None:
    """Load the newest complete checkpoint into the engine; returns its state, or None to start afresh. A collective.

    Args:
        identity: what must be as it was (plan version, index hash); kept in the state by the caller.

    Raises:
        InputError: `run.resume` and what is there do not fit, or data or world changed since.
    """
    # The first rank decides: on a shared file system others may see an older state.
    newest = max((int(path.stem.removeprefix("step-")) for path in checkpoints(folder)), default=-1)
    newest = int(world.maximum(newest if world.is_first else -1))
    if recipe.run.resume == "never":
        if newest >= 0:
            raise InputError(f"{folder} holds checkpoints: set run.resume=auto to go on, or name another run.folder")
        return None
    if newest < 0:
        if recipe.run.resume == "must":
            raise InputError(f"{folder}: no complete checkpoint to resume from (run.resume=must)")
        return None
    manifest = folder / f"step-{newest:08d}.json"
    state = json.loads(manifest.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {state.get(name)}, now {value}" for name, value in identity.items() if state.get(name) != value
    ]
    if changed:
        raise InputError(f"{manifest}: {'; '.join(changed)}: set it back, or name another run.folder")
    stage = recipe.engine.zero_stage
    # Without partitions (ZeRO 0) any number of ranks can go on.
    if state["zero_stage"] != stage or (stage and state["world"] != world.size):
        raise InputError(
            f"{manifest} was written by {state['world']} ranks under ZeRO {state['zero_stage']}; "
            f"resume with the same (now {world.size} under ZeRO {stage})"
        )
    path, _ = engine.load_checkpoint(str(folder), tag=manifest.stem)
    assert path is not None, f"DeepSpeed did not load {manifest.stem}"
    return state


def identity_of(recipe: Recipe, indexes: Sequence[ShardIndex]) -> dict:
    """What must not change between a checkpoint and the run that goes on from it: data, batches, model, precision."""
    settings = recipe.model_dump(mode="json", include={"data", "model", "objective"})
    settings["data"]["weights"] = [source.model_dump(mode="json")["weight"] for source in recipe.data.sources]
    for name in ("shards", "validation", "workers", "cache", "cache_limit_gib"):
        del settings["data"][name]
    flat = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
    return flat | {
        "engine.precision": recipe.engine.precision,
        "run.seed": recipe.run.seed,
        "plan_version": PLAN_VERSION,
        "index_hash": " ".join(index.hash for index in indexes),
    }


def load_weights(run: Path) -> tuple[dict, dict]:
    """Weights and state of the newest checkpoint of a run folder, put together from all ranks' files.

    The fp32 master weights, but for bf16 under ZeRO 0, where DeepSpeed stores the weights as bf16.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise InputError(f"{run}: no complete checkpoint to export")
    state = json.loads(found[-1].read_text(encoding="utf-8"))
    if state["zero_stage"]:
        with contextlib.redirect_stdout(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=found[-1].stem)
    else:
        import torch

        # DeepSpeed stores configuration objects beside the tensors, so `weights_only` cannot read its files; this is
        # the user's own run folder.
        file = folder / found[-1].stem / "mp_rank_00_model_states.pt"
        weights = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return weights, state


def _remove(folder: Path) -> None:
    """Uncommit first: the manifest goes before the files."""
    folder.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
