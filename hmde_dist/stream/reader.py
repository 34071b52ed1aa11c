"""Random access to the groups of a shard set, in either container, from the index alone.

Nothing from a shard is unpickled and no code in it can run: a sample is bytes, decoded by `corpus.shards.decode_group`.
Names inside a shard are never used.
"""

import contextlib
import json
import os
import queue
import threading
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import Group, decode_group
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.store import ShardStore

PREFETCHED_SHARDS = 64  # that wait to be downloaded
EVICTED_AT_MOST = 5  # times that a shard is evicted by others before it can be read


class GroupReader:
    """`reader[group]` is the decoded sample of that number. Cheap to make; safe to use in forked workers."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self._store = index.store or ShardStore(index.folder)
        self._shards = index.manifest["shards"]
        self._paths = [index.folder / entry["name"] for entry in self._shards]
        self._mds = _mds_readers(index) if index.manifest["container"] == "mds" else None
        self._prefetcher: tuple[int, queue.Queue, set[int]] | None = None  # process, shards to come, those in work

    def __getitem__(self, group: int) -> Group:
        shard, row = int(self.index.columns["group_shard"][group]), int(self.index.columns["group_row"][group])
        path = self._paths[shard]
        for _ in range(EVICTED_AT_MOST):
            if self._store.url:
                self._store.path(self._shards[shard])  # brings it
            try:
                return decode_group(self._sample(path, shard, row, group))
            except (OSError, ValueError, IndexError) as error:
                if isinstance(error, FileNotFoundError) and self._store.url:
                    continue
                way_out = "delete it, and it is downloaded again" if self._store.url else "restore or rebuild the shard"
                raise InputError(f"{path}: sample {row} is damaged ({error}); {way_out}") from None
        raise InputError(f"{path}: evicted from the cache before it could be read; raise data.cache_limit_gib")

    def _sample(self, path: Path, shard: int, row: int, group: int) -> bytes:
        if self._mds is not None:
            # A damaged sample table makes numpy warn of its overflow before the sample is refused.
            with np.errstate(over="ignore"):
                return self._mds[shard].decode_sample(self._mds[shard].get_sample_data(row))["group"]
        with open(path, "rb") as file:
            file.seek(int(self.index.columns["group_offset"][group]))
            return file.read(int(self.index.columns["group_bytes"][group]))

    def prefetch(self, groups: np.ndarray) -> None:
        """Begin to download the shards of these groups, in this order, in the background; returns at once.

        What cannot be downloaded is reported when it is read. Groups beyond `PREFETCHED_SHARDS` shards are left out.
        """
        if self._store.url is None:
            return
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not survive a fork
            self._prefetcher = (os.getpid(), queue.Queue(PREFETCHED_SHARDS), set())
            threading.Thread(target=self._download, args=self._prefetcher[1:], daemon=True).start()
        _, waiting, in_work = self._prefetcher
        for shard in dict.fromkeys(self.index.columns["group_shard"][groups].tolist()):
            if shard in in_work or self._store.has(self._shards[shard]):
                continue
            in_work.add(shard)
            try:
                waiting.put_nowait(shard)
            except queue.Full:
                in_work.discard(shard)
                return

    def _download(self, waiting: queue.Queue, in_work: set[int]) -> None:
        while True:
            shard = waiting.get()
            with contextlib.suppress(InputError):
                self._store.path(self._shards[shard])
            in_work.discard(shard)


def _mds_readers(index: ShardIndex) -> list:
    """mosaicml-streaming's reader of each shard; none opens its shard before a sample is asked for."""
    from streaming.base.format import reader_from_json  # heavy: only where MDS is read

    path = index.folder / "index.json"
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
        readers = [reader_from_json(str(index.folder), "", shard) for shard in shards]
        for reader, entry in zip(readers, index.manifest["shards"], strict=True):
            if reader.raw_data.basename != entry["name"]:
                raise ValueError(f"{reader.raw_data.basename} is not in the manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: missing or damaged ({error}); restore it or rebuild") from None
    for reader in readers:
        columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
        if columns != {"group": "bytes"}:
            raise InputError(f"{path}: expected the one column group:bytes")
    return readers
