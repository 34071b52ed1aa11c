"""Shards: groups of comparable documents, pre-tokenised, as MDS or WebDataset files with one index beside them.

One sample is one group with all its languages, so a text is stored once however many pairs are drawn from it.
Both containers hold the same bytes per sample (`encode_group`), written by the libraries' own writers.

    OUT/
      manifest.json            written last: counts, languages, tokenizer facts, size and hash of every file
      tokenizer/               the tokenizer, as a Hugging Face folder
      columns/*.npy            what a sampler needs without opening a shard (see `COLUMNS`)
      index.json, shard.00000.mds …   (MDS)    or    shard-00000.tar …   (WebDataset)
"""

import hashlib
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, output_folder, progress
from hmde_dist.corpus.documents import Document, group_documents
from hmde_dist.corpus.sentences import SPLITTER_VERSION, split_sentences
from hmde_dist.corpus.text import SentenceTokenizer

LAYOUT_VERSION = 1
SHARD_BYTES = 64 << 20
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
    """One sample, little-endian: magic, CRC-32 of what follows, header length, JSON header, lengths (uint16), ids (uint32)."""
    sentences = [tokens for pieces in documents.values() for tokens in pieces]
    header = {"id": id_, "languages": list(documents), "sentence_counts": [len(p) for p in documents.values()]}
    text = json.dumps(header, ensure_ascii=False).encode()
    lengths = np.array([len(tokens) for tokens in sentences], dtype="<u2")
    tokens = np.concatenate(sentences).astype("<u4")
    body = struct.pack("<I", len(text)) + text + lengths.tobytes() + tokens.tobytes()
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode_group(data: bytes) -> Group:
    """The inverse of `encode_group`.

    Raises:
        ValueError: `data` is not a sample of this layout, or a byte of it changed.
    """
    if data[:4] != MAGIC or len(data) < 12:
        raise ValueError("not a group sample")
    if struct.unpack_from("<I", data, 4)[0] != zlib.crc32(memoryview(data)[8:]):
        raise ValueError("checksum does not fit")
    (size,) = struct.unpack_from("<I", data, 8)
    header = json.loads(data[12 : 12 + size])
    counts = np.array(header["sentence_counts"], dtype=np.int64)
    lengths = np.frombuffer(data, "<u2", int(counts.sum()), 12 + size).astype(np.int64)
    tokens = np.frombuffer(data, "<u4", offset=12 + size + 2 * len(lengths))
    return Group(header["id"], header["languages"], counts, lengths, tokens)


class _MdsWriter:
    """mosaicml-streaming's writer, one `bytes` column."""

    def __init__(self, folder: Path):
        from streaming import MDSWriter  # a heavy import: only where MDS is written

        self.folder = folder
        self.writer = MDSWriter(out=str(folder), columns={"group": "bytes"}, size_limit=SHARD_BYTES, progress_bar=False)

    def write(self, key: int, data: bytes) -> None:
        self.writer.write({"group": data})

    def finish(self) -> list[tuple[str, list[int]]]:
        self.writer.finish()
        shards = json.loads((self.folder / "index.json").read_text())["shards"]
        return [(shard["raw_data"]["basename"], [0] * shard["samples"]) for shard in shards]


class _WdsWriter:
    """webdataset's writer, one `.bin` member per sample; the offsets of the members are read back from the tars."""

    def __init__(self, folder: Path):
        from webdataset import ShardWriter

        self.folder = folder
        # mtime=0: webdataset's default (a float) costs a PAX header per member and makes equal inputs unequal files.
        self.writer = ShardWriter(
            str(folder / "shard-%05d.tar"), maxcount=1 << 30, maxsize=SHARD_BYTES, verbose=0, mtime=0
        )

    def write(self, key: int, data: bytes) -> None:
        self.writer.write({"__key__": f"{key:09d}", "bin": data})

    def finish(self) -> list[tuple[str, list[int]]]:
        self.writer.close()
        shards = []
        for path in sorted(self.folder.glob("shard-*.tar")):
            with tarfile.open(path, "r:") as tar:
                shards.append((path.name, [member.offset_data for member in tar]))
        return shards


WRITERS = {"mds": _MdsWriter, "wds": _WdsWriter}


def candidate_clusters(versions: dict[str, Document]) -> set[str]:
    """The categories a group could be put under: each of its categories, and each path from the coarsest one down.

    Taken from the English version where that has categories, else from the first that has.
    """
    with_categories = [d for d in versions.values() if d.categories]
    chosen = next((d for d in with_categories if d.lang == "en"), with_categories[0] if with_categories else None)
    if chosen is None:
        return set()
    return set(chosen.categories) | {"/".join(chosen.categories[: i + 1]) for i in range(len(chosen.categories))}


def choose_clusters(groups: dict[str, dict[str, Document]]) -> dict[str, str]:
    """The cluster of each group: its smallest candidate that it shares with another group, "" if it shares none."""
    candidates = {id_: candidate_clusters(versions) for id_, versions in groups.items()}
    sizes = Counter(name for names in candidates.values() for name in names)
    return {
        # Names break ties: a longer one, which is a path, says more.
        id_: min((n for n in names if sizes[n] > 1), key=lambda n: (sizes[n], -len(n), n), default="")
        for id_, names in candidates.items()
    }


def build_shards(
    documents: Iterable[Document], tokenizer, sentence_tokens: int, out: str | Path, container: str
) -> dict:
    """Tokenise `documents` and write them as shards under `out`; returns the manifest.

    Groups are ordered by category, then id, so that neighbours share shards.

    Args:
        documents: any order; documents of one id become one sample.
        tokenizer: a fast `transformers` tokenizer.
        sentence_tokens: token budget of a sentence, without its two special tokens.
        container: "mds" or "wds".
    """
    if not 1 <= sentence_tokens <= np.iinfo(np.uint16).max - 2:
        raise InputError(f"--sentence-tokens {sentence_tokens} is too {'small' if sentence_tokens < 1 else 'large'}")
    try:
        encoder = SentenceTokenizer(tokenizer, sentence_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None
    by_id = group_documents(documents)
    cluster_of = choose_clusters(by_id)
    groups = sorted(by_id.items(), key=lambda item: (cluster_of[item[0]], item[0]))
    languages = sorted({lang for _, versions in groups for lang in versions})
    clusters = ["", *sorted(set(cluster_of.values()) - {""})]
    cluster_number = {name: number for number, name in enumerate(clusters)}
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    dropped: Counter = Counter()
    cut = 0
    with output_folder(out) as folder:
        writer = WRITERS[container](folder)
        for id_, versions, pieces, cut_here in _tokenised(groups, encoder):
            cut += cut_here
            kept = {lang: p for lang, p in zip(versions, pieces, strict=True) if p}
            dropped["documents_without_tokens"] += len(versions) - len(kept)
            if not kept:
                continue
            data = encode_group(id_, kept)
            writer.write(len(columns["group_cluster"]), data)
            columns["group_bytes"].append(len(data))
            columns["group_cluster"].append(cluster_number[cluster_of[id_]])
            columns["group_documents"].append(len(columns["document_language"]))
            for lang, sentences in kept.items():
                columns["document_language"].append(languages.index(lang))
                columns["document_sentences"].append(len(sentences))
                columns["document_tokens"].append(sum(map(len, sentences)))
        if not columns["group_cluster"]:
            raise InputError("no document has any token: nothing to write")
        columns["group_documents"].append(len(columns["document_language"]))
        shards = writer.finish()
        for number, (_, offsets) in enumerate(shards):
            columns["group_shard"] += [number] * len(offsets)
            columns["group_row"] += range(len(offsets))
            columns["group_offset"] += offsets
        (folder / "columns").mkdir()
        for name, dtype in COLUMNS.items():
            np.save(folder / "columns" / f"{name}.npy", np.array(columns[name], dtype=dtype))
        tokenizer.save_pretrained(folder / "tokenizer")
        manifest = {
            "layout": LAYOUT_VERSION,
            "container": container,
            "groups": len(columns["group_cluster"]),
            "documents": len(columns["document_language"]),
            "sentences": sum(columns["document_sentences"]),
            "tokens": sum(columns["document_tokens"]),
            "languages": languages,
            "clusters": clusters,
            "splitter": SPLITTER_VERSION,
            "sentence_tokens": sentence_tokens,
            "long_sentences_cut": cut,
            "dropped": dict(dropped),
            "vocabulary": len(tokenizer),
            "tokenizer": _fingerprint(folder / "tokenizer" / "tokenizer.json"),
            "special_ids": {"cls": encoder.cls_id, "sep": encoder.sep_id, "pad": encoder.pad_id},
            "shards": [_fingerprint(folder / name) for name, _ in shards],
            "columns": [_fingerprint(folder / "columns" / f"{name}.npy") for name in COLUMNS],
        }
        (folder / "manifest.json").write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return manifest


def _tokenised(groups: list, encoder: SentenceTokenizer, batch: int = 128) -> Iterator[tuple]:
    """(id, versions, token pieces of each version, long sentences cut) of every group, tokenised in batches."""
    with progress(total=len(groups), desc="tokenise", unit="group") as bar:
        for first in range(0, len(groups), batch):
            chosen = groups[first : first + batch]
            flat = [document for _, versions in chosen for document in versions.values()]
            sentences = [list(d.sentences) or split_sentences(d.text, d.lang) for d in flat]
            encoded = iter(zip(encoder.encode(sentences), sentences, strict=True))
            for id_, versions in chosen:
                pairs = [next(encoded) for _ in versions]
                cut = sum(max(0, len(pieces) - len(whole)) for pieces, whole in pairs)
                yield id_, versions, [pieces for pieces, _ in pairs], cut
            bar.update(len(chosen))


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
