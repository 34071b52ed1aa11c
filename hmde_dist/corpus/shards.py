"""The layout of shards: groups of comparable documents, pre-tokenised, as MDS or WebDataset files with one index.

One sample is one group with all its languages, so a text is stored once however many pairs are drawn from it. Both
containers hold the same bytes per sample (`encode_group`). A sample is compressed by itself, so that any sample can be
read from a file, or from a range of a remote one, without the rest. `corpus.shard_build` writes all this.

    OUT/
      manifest.json            written last: counts, languages, tokenizer facts, sources, size and hash of every file
      tokenizer/               the tokenizer, as a Hugging Face folder
      columns/*.npy            what a sampler needs without opening a shard (see `COLUMNS`)
      index.json, shard.00000.mds …   (MDS)    or    shard-00000.tar …   (WebDataset)
"""

import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import zstd

LAYOUT_VERSION = 2
ZSTD_LEVEL = 3
NO_CLUSTER = 0
MAGIC = b"HMDG"

# Columns of the index: per group (G), per document (D), groups' documents lying together.
COLUMNS = {
    "group_shard": np.uint32,  # [G] number of the shard file
    "group_row": np.uint32,  # [G] sample inside the shard
    "group_offset": np.uint64,  # [G] first byte of the sample in its file (WebDataset; 0 in MDS)
    "group_bytes": np.uint32,  # [G] size of the sample
    "group_cluster": np.uint32,  # [G] category the group belongs to, `NO_CLUSTER` = none
    "group_documents": np.uint32,  # [G + 1] first document of each group, then D
    "group_categories": np.uint64,  # [G + 1] first entry of each group in `category`, then C
    "category": np.uint32,  # [C] all categories of each group that another group shares, as numbers without names
    "document_language": np.uint16,  # [D] position in the manifest's `languages`
    "document_sentences": np.uint32,  # [D]
    "document_tokens": np.uint32,  # [D] content tokens, without special ones
}


@dataclass(frozen=True, slots=True)
class Group:
    """A decoded sample: the token ids of one group of comparable documents, without special tokens."""

    id: str
    languages: list[str]  # of its D documents
    sentence_counts: np.ndarray  # [D]
    sentence_lengths: np.ndarray  # [S] tokens of every sentence of every document, in order
    tokens: np.ndarray  # [T] uint32, in order

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and sentence lengths of document `index`."""
        first = int(self.sentence_counts[:index].sum())
        start = int(self.sentence_lengths[:first].sum())
        lengths = self.sentence_lengths[first : first + int(self.sentence_counts[index])]
        return self.tokens[start : start + int(lengths.sum())], lengths


def encode_group(id_: str, documents: dict[str, list[np.ndarray]]) -> bytes:
    """One sample: magic, CRC-32 of what follows, and a zstd frame of header length, JSON header, lengths (uint16) and ids
    (uint32), little-endian.
    """
    sentences = [tokens for pieces in documents.values() for tokens in pieces]
    header = {"id": id_, "languages": list(documents), "sentence_counts": [len(p) for p in documents.values()]}
    text = json.dumps(header, ensure_ascii=False).encode()
    lengths = np.array([len(tokens) for tokens in sentences], dtype="<u2")
    tokens = np.concatenate(sentences).astype("<u4")
    body = struct.pack("<I", len(text)) + text + lengths.tobytes() + tokens.tobytes()
    packed = zstd.compress(body, ZSTD_LEVEL)
    return MAGIC + struct.pack("<I", zlib.crc32(packed)) + packed


def decode_group(data: bytes) -> Group:
    """The inverse of `encode_group`.

    Raises:
        ValueError: `data` is not a sample of this layout, or a byte of it changed.
    """
    if data[:4] != MAGIC or len(data) < 12:
        raise ValueError("not a group sample")
    if struct.unpack_from("<I", data, 4)[0] != zlib.crc32(memoryview(data)[8:]):
        raise ValueError("checksum does not fit")
    try:
        body = zstd.decompress(data[8:])
    except zstd.Error as error:
        raise ValueError(f"no zstd frame ({error})") from None
    (size,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + size])
    counts = np.array(header["sentence_counts"], dtype=np.int64)
    lengths = np.frombuffer(body, "<u2", int(counts.sum()), 4 + size).astype(np.int64)
    tokens = np.frombuffer(body, "<u4", offset=4 + size + 2 * len(lengths))
    return Group(header["id"], header["languages"], counts, lengths, tokens)
