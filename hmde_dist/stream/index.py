"""The opened index of a shard set: what is in it, without opening a shard.

Refuses a set that is incomplete: a file that is missing or has not the size the manifest states is named here, before
anything is read from it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import COLUMNS, LAYOUT_VERSION


@dataclass(frozen=True)
class ShardIndex:
    """Columns (see `corpus.shards.COLUMNS`, memory-mapped) and manifest of the shard set in `folder`."""

    folder: Path
    manifest: dict = field(repr=False)
    columns: dict[str, np.ndarray] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "ShardIndex":
        """Open and check the shard set in `folder`.

        Raises:
            InputError: no shard set, another layout version, or a file that is missing or of the wrong size.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder}: no shard set (manifest.json is missing); build one with tools/build_shards.py"
            ) from None
        except ValueError as error:
            raise InputError(f"{folder}/manifest.json: damaged ({error}); restore it or rebuild") from None
        if not isinstance(manifest, dict) or not {"layout"} <= set(manifest):
            raise InputError(f"{folder}/manifest.json: damaged; restore it or rebuild")
        if manifest.get("layout") != LAYOUT_VERSION:
            raise InputError(
                f"{folder}: shard layout {manifest.get('layout')}, this version reads {LAYOUT_VERSION}: rebuild"
            )
        if not {"shards", "columns", "languages", "groups", "container"} <= set(manifest):
            raise InputError(f"{folder}/manifest.json: damaged; restore it or rebuild")
        for entry, parent in [(e, folder) for e in manifest["shards"]] + [
            (e, folder / "columns") for e in manifest["columns"]
        ]:
            path = parent / entry["name"]
            if not path.is_file():
                raise InputError(f"{path}: shard file is missing; restore it or rebuild with tools/build_shards.py")
            if path.stat().st_size != entry["bytes"]:
                raise InputError(
                    f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}: damaged or half-copied"
                )
        columns = {name: np.load(folder / "columns" / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        return cls(folder, manifest, columns)

    @property
    def groups(self) -> int:
        return self.manifest["groups"]

    @property
    def languages(self) -> list[str]:
        return self.manifest["languages"]

    @property
    def hash(self) -> str:
        """Fingerprint of the content: the same for equal documents, tokenizer and settings in one container."""
        files = [entry["sha256"] for entry in self.manifest["columns"] + self.manifest["shards"]]
        return hashlib.sha256("".join(files).encode()).hexdigest()[:16]
