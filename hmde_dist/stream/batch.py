"""Packing: ragged documents as a few dense tensors, without padding the model would have to compute.

Sentences of all documents lie together, sorted into length buckets for the sentence encoder; sentence vectors are then
laid out as one flat stream for the document encoder, documents of equal length side by side. numpy only, no Python
work per token. The file travels inside exported models.

Legend: N sentences of a bucket, L tokens of its sentences, U vectors of the upper stream, D documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


def bucket_boundaries(longest: int) -> list[int]:
    """Bucket lengths from 3 (one token between two special ones) to `longest`: each to 16, then 8 an octave.

    Less than 1/8 of any row is padding.
    """
    boundaries, length = [], 2
    while length < longest:
        length += max(1, 1 << max(0, length.bit_length() - 4))
        boundaries.append(min(length, longest))
    return boundaries


@dataclass(frozen=True)
class PackedBatch:
    """Documents ready for `HMDEModel`."""

    ids: list[torch.Tensor]  # per bucket [N, L] token ids with special tokens
    lengths: list[torch.Tensor]  # per bucket [N] tokens of each row; the rest of the row is padding
    upper_rows: torch.Tensor  # [U] row of the concatenated sentence vectors; the row behind the last is [DCLS]
    upper_positions: torch.Tensor  # [U] position inside the document, [DCLS] = 0
    sentence_rows: torch.Tensor  # [S] row of the concatenated sentence vectors of every sentence, in document order
    document_rows: torch.Tensor  # [D] place of each document among the documents of the upper stream
    runs: tuple[tuple[int, int], ...]  # (vectors of a document, number of such documents) along the upper stream
    sentence_counts: tuple[int, ...]  # [D] sentences of each document, in document order
    tokens: int  # real tokens, special ones included
    slots: int  # tokens computed, padding included

    def to(self, device: torch.device | str) -> "PackedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """In memory that a GPU copies from while it computes."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        return replace(
            self,
            ids=[change(t) for t in self.ids],
            lengths=[change(t) for t in self.lengths],
            upper_rows=change(self.upper_rows),
            upper_positions=change(self.upper_positions),
            sentence_rows=change(self.sentence_rows),
            document_rows=change(self.document_rows),
        )


def pack(
    documents: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    sentence_tokens: int,
    sentences: int,
) -> PackedBatch:
    """Pack documents, keeping the first `sentences` sentences of each.

    Every bucket is present in every batch (an empty one holds a row that nothing reads): all ranks then call the
    sentence encoder the same number of times, which ZeRO-3's collectives need.

    Args:
        documents: per document its content token ids (flat) and the token counts of its sentences.
        sentence_tokens: most content tokens of a sentence in this data.
    """
    kept = [lengths[:sentences] for _, lengths in documents]
    counts = np.array([len(lengths) for lengths in kept], dtype=np.int64)
    lengths = np.concatenate([*kept, np.empty(0, np.int64)]).astype(np.int64)
    tokens = np.concatenate(
        [*(ids[: k.sum()] for (ids, _), k in zip(documents, kept, strict=True)), np.empty(0, np.uint32)]
    )
    starts = np.cumsum(lengths) - lengths
    boundaries = bucket_boundaries(sentence_tokens + 2)
    bucket = np.searchsorted(boundaries, lengths + 2)

    ids_per_bucket, lengths_per_bucket = [], []
    sentence_rows = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    for number, longest in enumerate(boundaries):
        members = np.flatnonzero(bucket == number)
        ids = np.full((max(1, len(members)), longest), pad_id, dtype=np.int64)
        row_lengths = np.full(len(ids), longest, dtype=np.int64)
        if len(members):
            content = lengths[members]
            inside = np.arange(longest - 2) < content[:, None]
            ids[:, 0] = cls_id
            ids[:, 1:-1][inside] = tokens[(starts[members, None] + np.arange(longest - 2))[inside]]
            ids[np.arange(len(ids)), content + 1] = sep_id
            row_lengths = content + 2
        ids_per_bucket.append(torch.from_numpy(ids))
        lengths_per_bucket.append(torch.from_numpy(row_lengths))
        sentence_rows[members] = rows + np.arange(len(members))
        rows += len(ids)

    order = np.argsort(counts, kind="stable")
    first = np.cumsum(counts) - counts
    sizes = counts[order] + 1
    begins = np.cumsum(sizes) - sizes
    positions = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    upper_rows = np.full(sizes.sum(), rows, dtype=np.int64)
    is_sentence = positions > 0
    upper_rows[is_sentence] = sentence_rows[(np.repeat(first[order], sizes) + positions - 1)[is_sentence]]
    run_sizes, run_counts = np.unique(sizes, return_counts=True)
    return PackedBatch(
        ids=ids_per_bucket,
        lengths=lengths_per_bucket,
        upper_rows=torch.from_numpy(upper_rows),
        upper_positions=torch.from_numpy(positions),
        sentence_rows=torch.from_numpy(sentence_rows),
        document_rows=torch.from_numpy(np.argsort(order, kind="stable")),
        runs=tuple(zip(run_sizes.tolist(), run_counts.tolist(), strict=True)),
        sentence_counts=tuple(counts.tolist()),
        tokens=int((lengths + 2).sum()),
        slots=int(sum(ids.numel() for ids in ids_per_bucket)),
    )
