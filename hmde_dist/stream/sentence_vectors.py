"""Sentence vectors that were computed once, for a sentence encoder that does not change: read by document, like tokens.

FOLDER/                    beside the shard set, or in its cache; named after the weights and the data (`key`)
  block-00000.bf16         [rows, W] bfloat16: the sentences of consecutive documents, in the order of the index
  manifest.json            written last

Which document lies where follows from the index alone, so blocks can be computed in any order, by any number of
processes, and a block that is there is whole. Refuses a folder without its manifest, or with a block of another size.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, output_file
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.sliding_windows import SlidingWindows

BLOCK_ROWS = 1 << 16  # sentences of a block, about


@dataclass(frozen=True)
class VectorLayout:
    """Where the sentence vectors of a shard set lie.

    Attributes:
        first_row: [documents + 1] the first row of each document, over all blocks.
        first_document: [blocks + 1] the first document of each block.
    """

    width: int
    first_row: np.ndarray = field(repr=False)
    first_document: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls, index: ShardIndex, width: int, sentences: int | None, windows: SlidingWindows | None = None
    ) -> "VectorLayout":
        """Of the first `sentences` segments of every document of `index` (none: of all of them)."""
        counts = index.segments(windows)
        counts = counts if sentences is None else np.minimum(counts, sentences)
        first_row = np.concatenate([[0], np.cumsum(counts)])
        # A document lies in one block: that in which it begins.
        block = first_row[:-1] // BLOCK_ROWS
        first_document = np.searchsorted(block, np.arange(block[-1] + 2 if len(block) else 1))
        return cls(width, first_row, first_document)

    @property
    def blocks(self) -> int:
        return len(self.first_document) - 1

    def block_rows(self, block: int) -> int:
        first, stop = self.first_document[block : block + 2]
        return int(self.first_row[stop] - self.first_row[first])

    def block_file(self, folder: Path, block: int) -> Path:
        return folder / f"block-{block:05d}.bf16"

    def is_whole(self, folder: Path, block: int) -> bool:
        file = self.block_file(folder, block)
        return file.is_file() and file.stat().st_size == self.block_rows(block) * self.width * 2


class SentenceVectors:
    """`vectors.document(number, start, count)`: rows of a document, as the 16 bits of each bfloat16.

    Cheap to make; safe to use in forked workers.
    """

    def __init__(self, folder: Path, layout: VectorLayout):
        self.folder, self.layout = folder, layout
        if not (folder / "manifest.json").is_file():
            raise InputError(
                f"{folder}: no sentence vectors (manifest.json is missing); make them with tools/freeze.py"
            )
        for block in range(layout.blocks):
            if not layout.is_whole(folder, block):
                raise InputError(
                    f"{layout.block_file(folder, block)}: missing or damaged; delete {folder / 'manifest.json'} and "
                    "start again: only this block is computed anew"
                )
        self._maps: dict[int, np.ndarray] = {}

    def document(self, number: int, start: int, count: int) -> np.ndarray:
        """[at most `count`, W] int16: the vectors of sentences `start` to `start + count - 1` of a document."""
        layout = self.layout
        block = int(np.searchsorted(layout.first_document, number, side="right")) - 1
        if block not in self._maps:
            shape = (layout.block_rows(block), layout.width)
            self._maps[block] = np.memmap(layout.block_file(self.folder, block), dtype=np.int16, mode="r", shape=shape)
        first, stop = layout.first_row[number], layout.first_row[number + 1]
        before = layout.first_row[layout.first_document[block]]
        return self._maps[block][first - before + start : min(stop, first + start + count) - before]


def write_manifest(folder: Path, layout: VectorLayout, facts: dict) -> None:
    """What makes the blocks a whole."""
    with output_file(folder / "manifest.json") as file:
        json.dump(
            facts | {"rows": int(layout.first_row[-1]), "width": layout.width, "blocks": layout.blocks}, file, indent=1
        )
