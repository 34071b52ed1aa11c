"""The saver: writes checkpoints while training goes on, and makes them real only when all ranks have checked them.

A save copies the rank's slices into a buffer laid out as the file will be; that is what training waits for. A thread then
writes, hashes and syncs the file; then it reads back the file of the next rank, so what one rank wrote another has seen. When
all ranks have, at the end of some step, the first rank renames folder and manifest into place. A save that fails on any rank
(a full disk) is removed and reported, and leaves what was complete as it was.
"""

import copy
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hmde_dist.command import InputError
from hmde_dist.engine import checkpoint, training_state
from hmde_dist.recipe import RunSection
from hmde_dist.topology import World

DTYPES = {  # names in safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class RankFile:
    """The file of one rank: its fixed layout, and the buffer that is written.

    Not `safetensors.torch.save_file`: that copies once more and keeps other threads waiting; here bytes are hashed and
    written in pieces, beside the training.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        # Larger elements first, so that all are aligned.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        layout, place, self.sources = {}, 0, []
        for name, tensor in ordered:
            size = tensor.numel() * tensor.element_size()
            layout[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": [tensor.numel()],
                "data_offsets": [place, place + size],
            }
            self.sources.append((place, tensor.detach().view(-1).view(torch.uint8)))
            place += size
        header = json.dumps(layout).encode()
        header += b" " * (-len(header) % 8)
        self.header = len(header).to_bytes(8, "little") + header
        on_gpu = any(source.is_cuda for _, source in self.sources)
        self.buffer = torch.empty(place, dtype=torch.uint8, pin_memory=on_gpu)
        self.targets = [self.buffer[place : place + len(source)] for place, source in self.sources]

    def copy(self) -> None:
        """Take the tensors as they are now."""
        for (_, source), target in zip(self.sources, self.targets, strict=True):
            target.copy_(source, non_blocking=True)
        if self.buffer.is_pinned():
            torch.cuda.synchronize()

    def write(self, path: Path, moved: Callable[[], None]) -> dict:
        """Write and sync; returns size and checksum."""
        digest, data = hashlib.sha256(), memoryview(self.buffer.numpy())
        with open(path, "wb") as file:
            for block in (
                self.header,
                *(data[i : i + checkpoint.CHUNK] for i in range(0, len(data), checkpoint.CHUNK)),
            ):
                file.write(block)
                digest.update(block)
                moved()
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(self.header) + len(data), "sha256": digest.hexdigest()}


@dataclass
class _Save:
    """One checkpoint on its way."""

    manifest: dict
    thread: threading.Thread | None = None
    problem: str = ""
    written: dict = field(default_factory=dict)  # size and checksum of this rank's file
    files: dict = field(default_factory=dict)  # of all ranks', once all are written

    @property
    def step(self) -> int:
        return self.manifest["state"]["step"]


class Saver:
    """Writes the checkpoints of a run. All methods but the constructor are collectives.

    Args:
        identity: see `checkpoint.identity_of`.
        report: called on all ranks as `report("checkpoint" or "checkpoint_failed", **facts)` when a save has ended.
        alive: called while bytes move, so that a long save is not taken for a hang.
    """

    def __init__(
        self, engine, run: RunSection, identity: dict, world: World, report: Callable, alive: Callable = lambda: None
    ):
        self.engine, self.run, self.identity, self.world = engine, run, identity, world
        self.folder, self.report, self.alive = run.folder / "checkpoints", report, alive
        self.save: _Save | None = None
        self.newest: int | None = None  # step of the last save that became real
        self.file: RankFile | None = None

    def begin(self, state: dict) -> None:
        """Copy what is to be saved and go on; `state` is plain data. A save that is still on its way is finished first.

        The step of the newest checkpoint is not saved again: batches that were skipped since will be skipped again.
        """
        self.finish()
        if self.newest == state["step"]:
            return
        if self.file is None:
            tensors = {
                f"{part}/{piece.start}/{piece.name}": tensor
                for piece in training_state.owned_slices(self.engine, self.world)
                for part, tensor in piece.parts.items()
            }
            if self.world.is_first:
                tensors |= {f"buffer/0/{name}": tensor for name, tensor in training_state.buffers(self.engine).items()}
            self.file = RankFile(tensors)
        self.file.copy()
        self.save = _Save(
            {
                "state": copy.deepcopy(state),
                "identity": self.identity,
                "time": time.time(),
                "world": self.world.size,
                "zero_stage": self.engine.zero_optimization_stage(),
                "parameters": training_state.shapes(self.engine),
                "frozen": [name for name, p in self.engine.module.named_parameters() if not p.requires_grad],
                "buffers": {name: list(buffer.shape) for name, buffer in training_state.buffers(self.engine).items()},
                "versions": {"torch": torch.__version__},
            }
        )
        self._start(self._write)

    def advance(self) -> None:
        """Between two steps: one small collective while a save is on its way, nothing else."""
        if self.save is None or self.world.agree(self.save.thread.is_alive()):
            return
        save, problems = self.save, self.world.messages(self.save.problem)
        if not problems and not save.files:
            save.files = dict(
                sorted({k: v for part in self.world.gather(save.written) for k, v in part.items()}.items())
            )
            self._start(self._check)
            return
        if not problems:
            # The first rank alone; what goes wrong here, all must know.
            if self.world.is_first:
                self._guarded(self._commit)
            problems = self.world.messages(save.problem)
        self.save = None
        if problems:
            if self.world.is_first:
                checkpoint.sweep(self.folder)
            self.world.barrier()
            self.report("checkpoint_failed", step=save.step, problem=problems[0])
            if self.world.is_first:
                print(f"warning: the checkpoint of step {save.step} failed: {problems[0]}", file=sys.stderr)
        else:
            self.newest = save.step
            self.report("checkpoint", step=save.step)

    def finish(self) -> bool:
        """Wait until the save on its way has ended; returns whether it is complete (true if there is none)."""
        step = self.save.step if self.save else self.newest
        while self.save is not None:
            self.save.thread.join()
            self.advance()
        return self.newest == step

    def _start(self, work: Callable[[], None]) -> None:
        self.save.thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint", daemon=True)
        self.save.thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, this save must not become real
            told = isinstance(error, OSError | InputError | checkpoint.DamagedCheckpoint)
            self.save.problem = str(error) if told else repr(error)

    @property
    def _partial(self) -> Path:
        return self.folder / f".{checkpoint.tag_of(self.save.step)}.partial"

    def _write(self) -> None:
        self._partial.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.world.rank:05d}.safetensors"
        self.save.written = {name: self.file.write(self._partial / name, self.alive)}

    def _check(self) -> None:
        name = f"rank-{(self.world.rank + 1) % self.world.size:05d}.safetensors"
        checkpoint.check_file(self._partial / name, self.save.files[name])

    def _commit(self) -> None:
        save, tag = self.save, checkpoint.tag_of(self.save.step)
        checkpoint.remove(self.folder, save.step)
        sync_folder(self._partial)
        self._partial.rename(self.folder / tag)
        checkpoint.write_manifest(self.folder / f"{tag}.json", save.manifest | {"files": save.files})
        sync_folder(self.folder)
        best = save.manifest["state"].get("best", {}).get("step")
        for step in checkpoint.outdated(self.folder, self.run.keep_checkpoints, self.run.keep_every_hours):
            if step != best:
                checkpoint.remove(self.folder, step)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
