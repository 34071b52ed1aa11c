"""Grouping on disk: lines are dealt into buckets by their id, and all lines of an id come out of one bucket together.

Only one bucket at a time is in memory, however large the corpus. An id falls to the same bucket everywhere.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

BUCKET_BYTES = 64 << 20  # of text that one bucket holds, about
_BUFFER_BYTES = 32 << 20

T = TypeVar("T")


def buckets_for(text_bytes: int) -> int:
    """The number of buckets for a corpus of about this size."""
    return 1 + text_bytes // BUCKET_BYTES


def bucket_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


class Dealer:
    """Appends lines to the buckets of `folder`; `close` writes the rest."""

    def __init__(self, folder: Path, buckets: int):
        self.folder, self.buckets = folder, buckets
        self._waiting: dict[int, list[bytes]] = {}
        self._bytes = 0

    def deal(self, id_: str, line: bytes) -> None:
        """Add `line`, which ends with a line break, to the bucket of `id_`."""
        self._waiting.setdefault(zlib.crc32(id_.encode()) % self.buckets, []).append(line)
        self._bytes += len(line)
        if self._bytes > _BUFFER_BYTES:
            self.close()

    def close(self) -> None:
        # Opened for each batch of lines: there may be more buckets than a process may hold files.
        for number, lines in self._waiting.items():
            with open(bucket_path(self.folder, number), "ab") as file:
                file.writelines(lines)
        self._waiting, self._bytes = {}, 0


def read_bucket(
    parts: Iterable[Path], number: int, parse: Callable[[bytes], tuple[str, T]]
) -> Iterator[tuple[str, list[T]]]:
    """(id, its records) of bucket `number` over all `parts`, by id; records in the order of parts and lines.

    Args:
        parts: folders of dealers.
        parse: a line as (id, record).
    """
    groups: dict[str, list[T]] = {}
    for folder in parts:
        path = bucket_path(folder, number)
        if path.exists():
            with open(path, "rb") as lines:
                for line in lines:
                    id_, record = parse(line)
                    groups.setdefault(id_, []).append(record)
    for id_ in sorted(groups):
        yield id_, groups.pop(id_)
