"""Folders of vectors: memory-mapped shards, and the facts of the documents that the vectors stand for.

    FOLDER/
      vectors-00000.npy   [rows, W] of some thousand documents, in their order; bfloat16 as uint16
      documents.jsonl     id, lang and title of each document
      offsets.npy         [D + 1] where the line of each document begins, and the end of the last one
      languages.npy       [D] the number of its language in the manifest's list
      rows.npy            [D + 1] first row of each document; only where a row is a sentence
      manifest.json       what the vectors are and which shards there are, written last

Owns the layout. Nothing that grows with the corpus is held in memory. Knows nothing of models and indexes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from hmde_dist.command import InputError

STORED_AS = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
FACTS = ("documents.jsonl", "offsets.npy", "languages.npy")
BLOCK_BYTES = 64 << 20  # of vectors (fp32) that are read at once


def store(rows: np.ndarray, precision: str) -> np.ndarray:
    """Vectors (fp32) as they lie on disk."""
    if precision == "bf16":
        return torch.from_numpy(rows).bfloat16().view(torch.int16).numpy().view("<u2")
    return rows.astype(STORED_AS[precision])


def restore(stored: np.ndarray, precision: str) -> np.ndarray:
    """The inverse of `store`."""
    if precision == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class VectorFile:
    """A `.npy` file of vectors that grows; a context manager. The number of rows is written at the end."""

    def __init__(self, path: Path, width: int, precision: str):
        self._file = open(path, "wb")
        self.width, self.precision, self.rows = width, precision, 0
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header, so that the number of rows has room to grow.
        header = {"descr": STORED_AS[self.precision].str, "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(store(rows, self.precision).tobytes())
        self.rows += len(rows)

    def __enter__(self) -> "VectorFile":
        return self

    def __exit__(self, *_) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


class Vectors:
    """The vectors of a folder, by row.

    Raises:
        InputError: no folder of vectors, or one with a shard that is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            self.width, self.precision = int(self.manifest["width"]), self.manifest["precision"]
            self.shards = self.manifest["shards"]
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"{self.folder}: no folder of vectors (its manifest.json is missing or another's); make one with "
                "tools/encode.py"
            ) from None
        self._ends = np.cumsum([shard["rows"] for shard in self.shards], dtype=np.int64)
        self._maps: dict[int, np.memmap] = {}
        for shard in self.shards:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: missing or not of {shard['bytes']} bytes; copy or encode the folder again")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.load(self.folder / self.shards[shard]["file"], mmap_mode="r")
        return self._maps[shard]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Rows [n, W] (fp32) by number, from the memory maps: for rows here and there."""
        found = np.empty((len(numbers), self.width), dtype=np.float32)
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shard_of):
            chosen = np.flatnonzero(shard_of == shard)
            inside = numbers[chosen] - (self._ends[shard] - self.shards[shard]["rows"])
            found[chosen] = restore(self._map(shard)[inside], self.precision)
        return found

    def blocks(self, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, rows [n, W] in fp32) of the rows `first` to `stop`, for one pass over many.

        Files are read, not mapped: pages of a map that was passed would stay in the process.
        """
        size = max(1, BLOCK_BYTES // (4 * self.width))
        while first < stop:
            shard = int(np.searchsorted(self._ends, first, side="right"))
            last = min(stop, first + size, int(self._ends[shard]))
            inside = first - int(self._ends[shard] - self.shards[shard]["rows"])
            mapped = self._map(shard)
            stored = np.fromfile(
                self.folder / self.shards[shard]["file"],
                dtype=mapped.dtype,
                count=(last - first) * self.width,
                offset=mapped.offset + inside * self.width * mapped.itemsize,
            )
            yield first, restore(stored.reshape(-1, self.width), self.precision)
            first = last


class Facts:
    """Id, language and title of the documents of a folder, by number, and their languages as one column."""

    def __init__(self, folder: str | Path, languages: Sequence[str]):
        folder = Path(folder)
        for name in FACTS:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing; copy the folder again")
        self._file = open(folder / "documents.jsonl", "rb")
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.language_names = list(languages)
        self.languages = np.load(folder / "languages.npy", mmap_mode="r")  # [D] numbers of `language_names`

    def __len__(self) -> int:
        return len(self.languages)

    def __getitem__(self, number: int) -> dict:
        first, stop = self._offsets[number : number + 2].tolist()
        return json.loads(os.pread(self._file.fileno(), stop - first, first))

    def ids(self, first: int, stop: int) -> list[str]:
        """Ids of the documents `first` to `stop`, in one read."""
        begin, end = int(self._offsets[first]), int(self._offsets[stop])
        lines = os.pread(self._file.fileno(), end - begin, begin).splitlines()
        return [json.loads(line)["id"] for line in lines]


def write_facts(folder: Path, parts: Sequence[Path], languages: Sequence[Sequence[str]]) -> list[str]:
    """Join the facts of `parts`, each with `documents.jsonl`, `lengths.npy` (of its lines) and `languages.npy`.

    Args:
        languages: what the language numbers of each part mean.

    Returns:
        The names of all languages, by number.
    """
    names = sorted(set().union(*languages))
    counts = [len(np.load(part / "lengths.npy", mmap_mode="r")) for part in parts]
    offsets = _column(folder / "offsets.npy", np.uint64, sum(counts) + 1)
    column = _column(folder / "languages.npy", np.uint16, sum(counts))
    first = end = 0
    with open(folder / "documents.jsonl", "wb") as file:
        for part, count, own in zip(parts, counts, languages, strict=True):
            with open(part / "documents.jsonl", "rb") as lines:
                shutil.copyfileobj(lines, file, 1 << 20)
            ends = end + np.cumsum(np.load(part / "lengths.npy"), dtype=np.uint64)
            offsets[first + 1 : first + count + 1] = ends
            number = np.array([names.index(name) for name in own], dtype=np.uint16)
            column[first : first + count] = number[np.load(part / "languages.npy")]
            first, end = first + count, int(ends[-1])
    offsets.flush()
    column.flush()
    return names


def write_rows(folder: Path, parts: Sequence[Path]) -> None:
    """Join `counts.npy` (rows of each document) of `parts` into `rows.npy`."""
    counts = [np.load(part / "counts.npy", mmap_mode="r") for part in parts]
    rows = _column(folder / "rows.npy", np.uint64, sum(map(len, counts)) + 1)
    first = end = 0
    for part in counts:
        rows[first + 1 : first + len(part) + 1] = end + np.cumsum(part, dtype=np.uint64)
        first, end = first + len(part), int(rows[first + len(part)])
    rows.flush()


def _column(path: Path, kind: type, length: int) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(length,))


def link(source: Path, target: Path) -> None:
    """`target` with the bytes of `source`: the same ones where the file system allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
