"""The opened index of a shard set: what is in it, without opening a shard.

Refuses a set that is incomplete: a file that is missing or has not the size the manifest states is named here, before
anything is read from it. Shards behind a URL are the exception: they are fetched, and checked, when they are read.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import COLUMNS, LAYOUT_VERSION
from hmde_dist.stream.sliding_windows import SlidingWindows
from hmde_dist.stream.store import ShardStore


@dataclass(frozen=True)
class ShardIndex:
    """Columns (see `corpus.shards.COLUMNS`, memory-mapped) and manifest of a shard set.

    Attributes:
        folder: holds `columns` and `tokenizer`; of a set behind a URL, its cache.
        store: where the shards are.
    """

    folder: Path
    manifest: dict = field(repr=False)
    columns: dict[str, np.ndarray] = field(repr=False)
    store: ShardStore | None = field(repr=False, default=None)

    @classmethod
    def open(cls, source: str | Path, cache: str | Path | None = None, cache_limit: int | None = None) -> "ShardIndex":
        """Open and check the shard set at `source`, a folder or a URL; of a URL, all but the shards is fetched.

        Args:
            cache, cache_limit: see `ShardStore.of`; without meaning for a folder.

        Raises:
            InputError: no shard set, another layout version, or a file that is missing or not what the manifest says.
        """
        store = ShardStore.of(source, cache, cache_limit)
        folder = store.folder
        manifest = _manifest(folder, store.url or str(folder))
        columns = [(entry, "columns") for entry in manifest["columns"]]
        if store.url:
            if "tokenizer_files" not in manifest:
                raise InputError(
                    f"{store.url}: the manifest lists no tokenizer files; rebuild the set with this version"
                )
            files = columns + [(entry, "tokenizer") for entry in manifest["tokenizer_files"]]
            files += [(manifest["index"], "")] if "index" in manifest else []
            for entry, parent in files:
                store.path(entry, parent)
        else:
            for entry, parent in [(entry, "") for entry in manifest["shards"]] + columns:
                _check(folder / parent / entry["name"], entry)
        try:
            # What is pickled in a file of numpy is not loaded.
            columns = {name: np.load(folder / "columns" / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        except (OSError, ValueError) as error:
            raise InputError(f"{store.url or folder}: a column is missing or damaged ({error}); rebuild it") from None
        return cls(folder, manifest, columns, store)

    @property
    def is_remote(self) -> bool:
        return self.store is not None and self.store.url is not None

    @property
    def groups(self) -> int:
        return self.manifest["groups"]

    @property
    def languages(self) -> list[str]:
        return self.manifest["languages"]

    def segments(self, windows: SlidingWindows | None, documents=slice(None)) -> np.ndarray:
        """Segments of documents (numbers, an array of any shape; all by default), int64: windows, or their sentences."""
        if windows is None:
            return self.columns["document_sentences"][documents].astype(np.int64)
        return windows.count(self.columns["document_tokens"][documents])

    def encoded(
        self, windows: SlidingWindows | None, most: int, documents=slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is encoded of documents if at most `most` segments are: segments, and tokens with two special ones each.

        The tokens of a document that has more sentences than that are an estimate, by the mean length of its sentences.
        """
        count = self.segments(windows, documents)
        tokens, kept = self.columns["document_tokens"][documents], np.minimum(count, most)
        content = tokens * (kept / np.maximum(1, count)) if windows is None else windows.size(tokens, kept)
        return kept, content + 2 * kept

    @property
    def hash(self) -> str:
        """Fingerprint of the content: the same for equal documents, tokenizer and settings in one container."""
        files = [entry["sha256"] for entry in self.manifest["columns"] + self.manifest["shards"]]
        return hashlib.sha256("".join(files).encode()).hexdigest()[:16]


def _manifest(folder: Path, name: str) -> dict:
    """The manifest of the shard set in `folder`, known to people as `name`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{name}: no shard set (manifest.json is missing); build one with tools/build_shards.py"
        ) from None
    except ValueError as error:
        raise InputError(f"{name}/manifest.json: damaged ({error}); restore it or rebuild") from None
    if not isinstance(manifest, dict) or not {"layout"} <= set(manifest):
        raise InputError(f"{name}/manifest.json: damaged; restore it or rebuild")
    if manifest.get("layout") != LAYOUT_VERSION:
        raise InputError(f"{name}: shard layout {manifest.get('layout')}, this version reads {LAYOUT_VERSION}: rebuild")
    if not {"shards", "columns", "languages", "groups", "container"} <= set(manifest):
        raise InputError(f"{name}/manifest.json: damaged; restore it or rebuild")
    lists = [manifest[key] for key in ("shards", "columns", "tokenizer_files") if key in manifest]
    lists += [[manifest["index"]]] if "index" in manifest else []
    if not all(isinstance(entries, list) and all(map(_is_entry, entries)) for entries in lists):
        raise InputError(f"{name}/manifest.json: damaged or not ours (names of its files); restore it or rebuild")
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether this states a file of the set: manifests come from outside, and a name must not lead out of the folder."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", entry["name"]) is not None
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def _check(path: Path, entry: dict) -> None:
    if not path.is_file():
        raise InputError(f"{path}: shard file is missing; restore it or rebuild with tools/build_shards.py")
    if path.stat().st_size != entry["bytes"]:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}: damaged or half-copied"
        )
