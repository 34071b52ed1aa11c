"""Packing: ragged documents as a few flat tensors, without any padding.

The tokens of all sentences of all documents are one stream for the sentence encoder, sentences of equal length side by
side; sentence vectors are then laid out as one stream for the document encoder, documents of equal length side by side.
numpy only, no Python work per token. The file travels inside exported models.

Legend: T tokens of the stream, N its sentences, S sentences in document order, U vectors of the upper stream, D documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Segments:
    """The pieces of a flat stream: pieces of equal length lie side by side, the shortest first."""

    runs: tuple[tuple[int, int], ...]  # (length of a piece, number of such pieces) along the stream
    starts: torch.Tensor  # [pieces + 1] int32: where each piece begins, and the end of the stream

    @classmethod
    def of(cls, sorted_lengths: np.ndarray) -> "Segments":
        """Of pieces of these lengths, in this order."""
        sizes, counts = np.unique(sorted_lengths, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(sorted_lengths)]).astype(np.int32)
        return cls(tuple(zip(sizes.tolist(), counts.tolist(), strict=True)), torch.from_numpy(starts))

    @property
    def longest(self) -> int:
        return self.runs[-1][0]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Segments":
        return replace(self, starts=change(self.starts))


@dataclass(frozen=True)
class DocumentFacts:
    """What objectives ask of the documents of a batch, in its order. Stays on the CPU."""

    numbers: (
        np.ndarray
    )  # int64 [D] place among the documents of the rank: [first of each pair..., second of each pair...]
    groups: np.ndarray  # int64 [D]; equal numbers are versions of one document
    languages: np.ndarray  # int64 [D]
    sentences: np.ndarray  # int64 [D] of the whole document (or windows, where they stand for sentences)
    starts: np.ndarray  # int64 [D] the first of them that is encoded
    step: int  # position of the global batch in the plan
    sides: int = 2  # 4 with explicit hard negatives
    teacher: np.ndarray | None = None  # fp32 [D, teacher's width]; NaN = it has no vector of the document


@dataclass(frozen=True)
class PackedBatch:
    """Documents ready for `HMDEModel`: as a token stream, or as sentence vectors that are known already."""

    ids: torch.Tensor  # [T] token ids with special tokens
    positions: torch.Tensor  # [T] of each token inside its sentence, from 0
    lower: Segments  # the sentences of the token stream
    upper_rows: torch.Tensor  # [U] row of the sentence vectors [N, W]; the row behind the last is [DCLS]
    upper_positions: torch.Tensor  # [U] position inside the document, [DCLS] = 0
    upper: Segments  # the documents of the upper stream
    sentence_rows: torch.Tensor  # [S] row of the sentence vectors [N, W] of every sentence, in document order
    document_rows: torch.Tensor  # [D] place of each document among the documents of the upper stream
    sentence_counts: tuple[int, ...]  # [D] sentences of each document, in document order
    tokens: int  # real tokens, special ones included
    vectors: torch.Tensor | None = None  # [N, W] bf16 in place of a token stream, which then is empty
    facts: DocumentFacts | None = None  # while training

    @property
    def slots(self) -> int:
        """Tokens of the stream, padding included; an encoder that pads it computes more (`HMDEModel.slots`)."""
        return self.tokens if self.vectors is not None else len(self.ids)

    def to(self, device: torch.device | str) -> "PackedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """In memory that a GPU copies from while it computes."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        return replace(
            self,
            ids=change(self.ids),
            positions=change(self.positions),
            lower=self.lower.map(change),
            upper_rows=change(self.upper_rows),
            upper_positions=change(self.upper_positions),
            upper=self.upper.map(change),
            sentence_rows=change(self.sentence_rows),
            document_rows=change(self.document_rows),
            vectors=None if self.vectors is None else change(self.vectors),
        )


def pack(
    documents: Sequence[tuple[np.ndarray, np.ndarray]], *, cls_id: int, sep_id: int, sentences: int
) -> PackedBatch:
    """Pack documents, keeping the first `sentences` sentences of each.

    A batch without any token holds one sentence that nothing reads: all ranks call the sentence encoder equally often.

    Args:
        documents: per document its content token ids (flat) and the token counts of its sentences.
    """
    kept = [lengths[:sentences] for _, lengths in documents]
    counts = np.array([len(lengths) for lengths in kept], dtype=np.int64)
    lengths = np.concatenate([*kept, np.empty(0, np.int64)]).astype(np.int64)
    content = np.concatenate(
        [*(ids[: k.sum()] for (ids, _), k in zip(documents, kept, strict=True)), np.empty(0, np.uint32)]
    )
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order] + 2 if len(lengths) else np.array([2])
    begins = np.cumsum(sizes) - sizes
    positions = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    ids = np.empty(len(positions), dtype=np.int64)
    inner = np.ones(len(ids), dtype=bool)
    ends = begins + sizes - 1
    inner[begins] = inner[ends] = False
    ids[begins], ids[ends] = cls_id, sep_id
    if len(lengths):
        starts = np.cumsum(lengths) - lengths
        # Where the content of each sentence begins, less the [CLS] before it.
        ids[inner] = content[(np.repeat(starts[order], sizes) + positions - 1)[inner]]
    sentence_rows = np.empty(len(lengths), dtype=np.int64)
    sentence_rows[order] = np.arange(len(lengths))

    return PackedBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        lower=Segments.of(sizes),
        tokens=int((lengths + 2).sum()),
        **_upper_stream(counts, sentence_rows, len(sizes)),
    )


def pack_vectors(documents: Sequence[np.ndarray], tokens: int) -> PackedBatch:
    """Pack documents whose sentence vectors are known.

    Args:
        documents: per document its sentence vectors [sentences, W], int16: the bits of bfloat16.
        tokens: of the sentences behind the vectors.
    """
    counts = np.array([len(vectors) for vectors in documents], dtype=np.int64)
    vectors = torch.from_numpy(np.concatenate(documents)).view(torch.bfloat16)
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        ids=nothing,
        positions=nothing,
        lower=Segments.of(np.empty(0, np.int64)),
        tokens=tokens,
        vectors=vectors,
        **_upper_stream(counts, np.arange(len(vectors)), len(vectors)),
    )


def _upper_stream(counts: np.ndarray, sentence_rows: np.ndarray, dcls_row: int) -> dict:
    """The fields of the upper stream, of documents of `counts` sentences with these rows."""
    order = np.argsort(counts, kind="stable")
    first = np.cumsum(counts) - counts
    sizes = counts[order] + 1
    positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.full(len(positions), dcls_row, dtype=np.int64)
    is_sentence = positions > 0
    rows[is_sentence] = sentence_rows[(np.repeat(first[order], sizes) + positions - 1)[is_sentence]]
    return {
        "upper_rows": torch.from_numpy(rows),
        "upper_positions": torch.from_numpy(positions),
        "upper": Segments.of(sizes),
        "sentence_rows": torch.from_numpy(sentence_rows),
        "document_rows": torch.from_numpy(np.argsort(order, kind="stable")),
        "sentence_counts": tuple(counts.tolist()),
    }
