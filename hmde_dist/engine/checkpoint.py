"""Checkpoints: tensors and plain data, complete or not there, for any number of ranks and any ZeRO stage.

    RUN/checkpoints/
      step-00000300/rank-00000.safetensors   the slices of weights, moments and buffers that this rank owned
      step-00000300.json                     the manifest, renamed into place last; without it the folder does not exist
      step-00000300.pinned                   made by you (`touch`): this checkpoint is never removed
      .step-00000400.partial/                one that is being written

The manifest holds the state of the run (step, position in the plan, guard, ...), what must not change (`identity`), the shape
of every parameter, size and SHA-256 of every file, and its own checksum. A tensor is called
`part/start/name`: elements from `start` on of the parameter `name`, so a file says itself what it holds, and another world
or stage reads other slices of the same files. Nothing is unpickled. Writing is the saver's (`saver.py`).
"""

import hashlib
import itertools
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hmde_dist.command import InputError, output_file
from hmde_dist.engine import training_state
from hmde_dist.recipe import Recipe
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.plan import PLAN_VERSION
from hmde_dist.stream.teacher import Teacher
from hmde_dist.topology import World

FORMAT = 2
CHUNK = 1 << 24  # bytes read, hashed and written at once


class DamagedCheckpoint(Exception):
    """A file of a checkpoint is missing, or is not what was written."""


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a manifest, oldest first; whether their files are whole is not looked at."""
    return sorted(int(path.stem.removeprefix("step-")) for path in Path(folder).glob("step-*.json"))


def write_manifest(path: Path, manifest: dict) -> None:
    manifest = {"format": FORMAT, **manifest}
    with output_file(path) as file:
        json.dump(manifest | {"checksum": _checksum_of_manifest(manifest)}, file, indent=1)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: it is not what was written.
        InputError: another version of the project wrote it.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum_of_manifest(manifest):
        if isinstance(manifest, dict) and "format" not in manifest and "zero_stage" in manifest:
            raise InputError(f"{path}: written by an earlier version of hmde_dist; name another run.folder")
        raise DamagedCheckpoint(f"{path} is damaged (checksum does not fit)")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path}: written in format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _checksum_of_manifest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def checksum_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, expected: dict) -> None:
    """Compare a file with its size and checksum.

    Raises:
        DamagedCheckpoint: they differ, or the file cannot be read.
    """
    try:
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written")
        if checksum_of(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path} is damaged (checksum does not fit)")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None


# ---- what stays ---------------------------------------------------------------------------------------------------------


def outdated(folder: Path, keep: int, keep_every_hours: float | None) -> list[int]:
    """The steps whose checkpoints may go: not the newest `keep`, not pinned, and not the first of every so many hours."""
    steps = steps_in(folder)
    spared = set(steps[-keep:])
    if keep_every_hours is not None:
        last = float("-inf")
        for step in steps:
            try:
                written = read_manifest(folder / f"{tag_of(step)}.json")["time"]
            except DamagedCheckpoint:
                continue
            if written - last >= keep_every_hours * 3600:
                spared.add(step)
                last = written
    return [step for step in steps if step not in spared and not (folder / f"{tag_of(step)}.pinned").exists()]


def remove(folder: Path, step: int) -> None:
    """Uncommit first: the manifest goes before the files."""
    (folder / f"{tag_of(step)}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / tag_of(step), ignore_errors=True)


def remove_after(folder: Path, step: int) -> None:
    """Remove what was saved after `step`, for the run goes another way; what is pinned is set aside as `abandoned-N-step-...`."""
    for later in steps_in(folder):
        if later <= step:
            continue
        tag = tag_of(later)
        if not (folder / f"{tag}.pinned").exists():
            remove(folder, later)
            continue
        number = next(n for n in itertools.count(1) if not (folder / f"abandoned-{n}-{tag}").exists())
        for name in (f"{tag}.json", f"{tag}.pinned", tag):
            (folder / name).rename(folder / f"abandoned-{number}-{name}")


def sweep(folder: Path) -> None:
    """Remove what killed saves left: folders that are partial or have no manifest."""
    for path in folder.glob(".step-*.partial*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in folder.glob("step-*/"):
        if not path.with_suffix(".json").exists():
            shutil.rmtree(path, ignore_errors=True)


# ---- going on -----------------------------------------------------------------------------------------------------------


def find(folder: Path, recipe: Recipe, identity: dict, world: World, before: int | None = None) -> dict | None:
    """The manifest of the newest whole checkpoint, or None to start afresh. A collective.

    Every file is read through once by one of the ranks. A damaged checkpoint is named on stderr, and the one before it is
    taken.

    Args:
        identity: what must be as it was (plan version, index hash, ...).
        before: only checkpoints whose position in the plan is at most this.

    Raises:
        InputError: `run.resume` and what is there do not fit, or data changed since, or all checkpoints are damaged.
    """
    damaged: list[str] = []
    step = float("inf")
    if world.is_first:
        sweep(folder)
    while True:
        # The first rank decides: on a shared file system others may see an older state.
        steps = [found for found in steps_in(folder) if found < step] if world.is_first else []
        step = int(world.maximum(max(steps, default=-1)))
        if step < 0:
            break
        if recipe.run.resume == "never" and before is None:
            raise InputError(f"{folder} holds checkpoints: set run.resume=auto to go on, or name another run.folder")
        path, manifest, problem = folder / f"{tag_of(step)}.json", None, ""
        try:
            manifest = read_manifest(path)
            if before is None or manifest["state"]["batch"] <= before:
                _check_identity(path, manifest["identity"], identity)
                for name in sorted(manifest["files"])[world.rank :: world.size]:
                    check_file(folder / tag_of(step) / name, manifest["files"][name])
                Pieces(folder, manifest)  # opens
        except DamagedCheckpoint as error:
            problem = str(error)
        problems = world.messages(problem)
        if not problems and (before is None or manifest["state"]["batch"] <= before):
            return manifest
        damaged += problems
        if problems and world.is_first:
            print(f"warning: {problems[0]}; trying the checkpoint before it", file=sys.stderr)
    if damaged and before is None:
        raise InputError(f"{folder}: no checkpoint is whole ({damaged[0]}); remove the folder to start afresh")
    if recipe.run.resume == "must" and before is None:
        raise InputError(f"{folder}: no complete checkpoint to resume from (run.resume=must)")
    return None


def _check_identity(path: Path, was: dict, now: dict) -> None:
    changed = [f"{name} was {was.get(name)}, now {value}" for name, value in now.items() if was.get(name) != value]
    if changed:
        raise InputError(f"{path}: {'; '.join(changed)}: set it back, or name another run.folder")


def identity_of(recipe: Recipe, indexes: Sequence[ShardIndex], teacher: Teacher | None = None) -> dict:
    """What must not change between a checkpoint and the run that goes on from it: data, batches, model, precision."""
    settings = recipe.model_dump(mode="json", include={"data", "model"})
    settings["data"]["weights"] = [source.model_dump(mode="json")["weight"] for source in recipe.data.sources]
    for name in ("shards", "validation", "workers", "cache", "cache_limit_gib", "teacher"):
        del settings["data"][name]
    flat = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
    return flat | {
        "objectives": [one.model_dump(mode="json") for one in recipe.objectives],
        "engine.precision": recipe.engine.precision,
        "run.seed": recipe.run.seed,
        "plan_version": PLAN_VERSION,
        "index_hash": " ".join(index.hash for index in indexes),
        "teacher": teacher and teacher.identity,
    }


def load(engine, folder: Path, manifest: dict, world: World) -> dict:
    """Load a checkpoint that `find` found into the engine; returns its state. A collective."""
    pieces, found = Pieces(folder, manifest), training_state.shapes(engine)
    if found != manifest["parameters"]:
        differing = sorted(n for n in found | manifest["parameters"] if found.get(n) != manifest["parameters"].get(n))
        raise InputError(f"{pieces.folder} is of another model: {', '.join(differing[:3])}")
    training_state.load_state(engine, manifest["state"]["step"], pieces.read, world)
    return manifest["state"]


class Pieces:
    """The tensors of a checkpoint, put together from the files of all ranks that wrote it."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self._frozen = folder / tag_of(manifest["state"]["step"]), set(manifest["frozen"])
        self._files, self._places = {}, defaultdict(list)
        for name in manifest["files"]:
            try:
                self._files[name] = safe_open(str(self.folder / name), framework="pt")
            except (OSError, SafetensorError) as error:
                raise DamagedCheckpoint(f"{self.folder / name} cannot be read ({error})") from None
            for key in self._files[name].keys():  # noqa: SIM118 (no mapping)
                part, start, parameter = key.split("/", 2)
                self._places[parameter, part].append((int(start), name, key))
        for places in self._places.values():
            places.sort()

    def read(self, name: str, part: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` [n] with elements of a parameter from `start` on; moments of one that was frozen are zero.

        Raises:
            InputError: the checkpoint has not all of them.
        """
        if part in training_state.MOMENTS and name in self._frozen:
            into.zero_()
            return
        filled = 0
        for first, file, key in self._places[name, part]:
            piece = self._files[file].get_slice(key)
            length = piece.get_shape()[0]
            begin, end = max(start, first), min(start + len(into), first + length)
            if begin < end:
                into[begin - start : end - start].copy_(piece[begin - first : end - first])
                filled += end - begin
        if filled != len(into):
            raise InputError(f"{self.folder} lacks elements of {part} {name}")

    def buffer(self, name: str) -> torch.Tensor:
        ((_, file, key),) = self._places[name, "buffer"]
        return self._files[file].get_tensor(key)


def load_weights(run: Path, only: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights, buffers and state of the newest whole checkpoint of a run folder, or of step `only`.

    Raises:
        InputError: there is none.
    """
    folder, problem = run / "checkpoints", ""
    for step in reversed(steps_in(folder) if only is None else [only]):
        try:
            manifest = read_manifest(folder / f"{tag_of(step)}.json")
            for name, expected in manifest["files"].items():
                check_file(folder / tag_of(step) / name, expected)
            pieces = Pieces(folder, manifest)
        except DamagedCheckpoint as error:
            problem = problem or f" ({error})"
            continue
        weights = {name: torch.empty(shape) for name, shape in manifest["parameters"].items()}
        for name, tensor in weights.items():
            pieces.read(name, training_state.WEIGHT, 0, tensor.view(-1))
        for name, shape in manifest["buffers"].items():
            weights[name] = pieces.buffer(name).view(shape)
        return weights, manifest["state"]
    raise InputError(f"{run}: no complete checkpoint to export{problem}")
