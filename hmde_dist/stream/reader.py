"""Random access to the groups of a shard set, in either container, from the index alone.

Nothing from a shard is unpickled and no code in it can run: a sample is bytes, decoded by `corpus.shards.decode_group`.
"""

import json

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import Group, decode_group
from hmde_dist.stream.index import ShardIndex


class GroupReader:
    """`reader[group]` is the decoded sample of that number. Cheap to make; safe to use in forked workers."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self._shards = [index.folder / entry["name"] for entry in index.manifest["shards"]]
        self._mds = None
        if index.manifest["container"] == "mds":
            from streaming.base.format import reader_from_json  # heavy: only where MDS is read

            path = index.folder / "index.json"
            try:
                shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
                self._mds = [reader_from_json(str(index.folder), "", shard) for shard in shards]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: missing or damaged ({error}); restore it or rebuild") from None
            for reader in self._mds:
                if dict(zip(reader.column_names, reader.column_encodings, strict=True)) != {"group": "bytes"}:
                    raise InputError(f"{index.folder}/index.json: expected the one column group:bytes")

    def __getitem__(self, group: int) -> Group:
        columns = self.index.columns
        shard, row = int(columns["group_shard"][group]), int(columns["group_row"][group])
        try:
            if self._mds is not None:
                # A damaged sample table makes numpy warn of its overflow before the sample is refused.
                with np.errstate(over="ignore"):
                    data = self._mds[shard].decode_sample(self._mds[shard].get_sample_data(row))["group"]
            else:
                with open(self._shards[shard], "rb") as file:
                    file.seek(int(columns["group_offset"][group]))
                    data = file.read(int(columns["group_bytes"][group]))
            return decode_group(data)
        except (OSError, ValueError, IndexError) as error:
            raise InputError(
                f"{self._shards[shard]}: sample {row} is damaged ({error}); restore or rebuild the shard"
            ) from None
