"""Documents -> shards (see `corpus.shards` for the layout), on disk from end to end.

The steps (`corpus.steps` makes each of them resumable and spreads it over processes):

    deal      each file of documents -> buckets by id
    encode    each bucket -> its groups, tokenised, as samples and small arrays beside them
    order     category of each group, order of all groups, which shard holds which
    write     each shard
    finish    columns, tokenizer, manifest

Memory holds a bucket or a shard in each process, and in `order` about 500 bytes a group (of three documents and five
categories).
Equal documents give equal files, in whatever order and on however many processes they come.
"""

import functools
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.buckets import Dealer, buckets_for
from hmde_dist.corpus.documents import Document, read_groups
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.sentences import SPLITTER_VERSION, split_sentences
from hmde_dist.corpus.shards import COLUMNS, LAYOUT_VERSION, NO_CLUSTER, encode_group
from hmde_dist.corpus.steps import Build, file_facts
from hmde_dist.corpus.text import SentenceTokenizer
from hmde_dist.corpus.tokenizer import load_tokenizer

STEPS = {"deal": True, "encode": True, "order": False, "write": True, "finish": False}
SHARD_BYTES = 64 << 20
TOKENISE_AT_ONCE = 128  # groups

# What `encode` says of its groups (g), their documents (d) and their categories (c).
_PARTS = {
    "group_bytes": np.uint32,  # [g]
    "group_rank": np.uint64,  # [g] hash of the id
    "group_documents": np.uint32,  # [g] number of documents
    "group_categories": np.uint32,  # [g] number of categories
    "category": np.uint64,  # [c] hash of the name
    "document_language": np.uint16,  # [d] position in `languages.json`
    "document_sentences": np.uint32,  # [d]
    "document_tokens": np.uint32,  # [d]
}


def build_shards(
    paths: Sequence[Path],
    tokenizer,
    sentence_tokens: int,
    out: Path,
    container: str,
    workers: int = 1,
    only: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict:
    """Tokenise the documents of the files `paths` and write them as shards under `out`; returns the manifest.

    Groups are ordered by category, so that neighbours share shards. A build that was stopped goes on where it stood.

    Args:
        paths: see `corpus.readers.read_documents`; documents of one id become one sample.
        tokenizer: a fast `transformers` tokenizer.
        sentence_tokens: token budget of a sentence, without its two special tokens.
        container: "mds" or "wds".
        only, share: see `corpus.steps.Build`.

    Raises:
        InputError: bad documents, or a tokenizer or budget that cannot be used.
        ShareDone: the share of step `only` is done.
    """
    if not 1 <= sentence_tokens <= np.iinfo(np.uint16).max - 2:
        raise InputError(f"--sentence-tokens {sentence_tokens} is too {'small' if sentence_tokens < 1 else 'large'}")
    try:
        encoder = SentenceTokenizer(tokenizer, sentence_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None
    paths, out = [Path(path) for path in paths], Path(out)
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file of documents")
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    settings = {
        "documents": file_facts(files),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "sentence_tokens": sentence_tokens,
        "format": container,
        "splitter": SPLITTER_VERSION,
        "layout": LAYOUT_VERSION,
    }
    # Text in documents compressed by gzip is three times their size; of the other kinds, at most about as much.
    text_bytes = sum((3 if file.suffix == ".gz" else 1) * file.stat().st_size for file in files)
    with Build(out, settings, workers, only, share) as build:
        if build.complete:
            return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        beside = build.work / "tokenizer"
        _keep_tokenizer(tokenizer, beside)
        buckets = buckets_for(text_bytes)
        dealt = build.run("deal", _deal, [(path, buckets) for path in paths])
        if not sum(part["documents"] for part in dealt):
            raise InputError("no documents: nothing to write")
        parts = [build.folder("deal", number) for number in range(len(paths))]
        encoded = build.run(
            "encode", _encode, [(parts, n, beside, settings["tokenizer"], sentence_tokens) for n in range(buckets)]
        )
        if not sum(part["groups"] for part in encoded):
            raise InputError("no document has any token: nothing to write")
        folders = [build.folder("encode", number) for number in range(buckets)]
        ((shards, clusters),) = build.run("order", _order, [(folders, SHARD_BYTES)])
        order = build.folder("order", 0)
        if container == "mds" and only in (None, "write"):
            import streaming  # noqa: F401  heavy: once, before processes are forked, not in each of them
        written = build.run("write", _WRITERS[container], [(n, folders, order) for n in range(shards)])
        counts = {
            "groups": sum(part["groups"] for part in encoded),
            "documents": sum(part["documents"] for part in encoded),
            "sentences": sum(part["sentences"] for part in encoded),
            "tokens": sum(part["tokens"] for part in encoded),
        }
        manifest = {
            "layout": LAYOUT_VERSION,
            "container": container,
            **counts,
            "languages": json.loads((order / "languages.json").read_text(encoding="utf-8")),
            "clusters": clusters,
            "splitter": SPLITTER_VERSION,
            "sentence_tokens": sentence_tokens,
            "long_sentences_cut": sum(part["cut"] for part in encoded),
            "dropped": {"documents_without_tokens": sum(part["dropped"] for part in encoded)},
            "vocabulary": len(tokenizer),
            "special_ids": {
                "cls": encoder.cls_id,
                "sep": encoder.sep_id,
                "pad": encoder.pad_id,
                "mask": tokenizer.mask_token_id,
            },
            "sources": [part["source"] for part in dealt],
            "shards": [part["file"] for part in written],
        }
        written_in = [build.folder("write", number) for number in range(shards)]
        entries = [part["index"] for part in written]
        build.finish(_finish, (written_in, entries, order, beside, manifest))
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def _keep_tokenizer(tokenizer, folder: Path) -> None:
    """Save the tokenizer as `folder`, all or nothing; of several jobs one does."""
    if folder.exists():
        return
    aside = Path(tempfile.mkdtemp(prefix=".tokenizer.", dir=folder.parent))
    tokenizer.save_pretrained(aside)
    aside.chmod(0o755)
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not folder.exists():
            raise


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _deal(folder: Path, path: Path, buckets: int) -> dict:
    """Step: the documents of one file, checked, in buckets by id."""
    dealer, count = Dealer(folder, buckets), 0
    for document in read_documents([path]):
        dealer.deal(document.id, document.as_json().encode() + b"\n")
        count += 1
    dealer.close()
    source = _fingerprint(path) if path.is_file() else {"name": path.name}
    # What the builder of the documents dropped and read travels with what was made of them.
    report = path.parent / "report.json"
    if report.is_file():
        source["report"] = json.loads(report.read_text(encoding="utf-8"))
    return {"documents": count, "source": source}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, fingerprint: str, sentence_tokens: int) -> SentenceTokenizer:
    return SentenceTokenizer(load_tokenizer(tokenizer), sentence_tokens)


def _encode(
    folder: Path, parts: Sequence[Path], bucket: int, tokenizer: Path, fingerprint: str, sentence_tokens: int
) -> dict:
    """Step: the groups of one bucket as samples in `samples.bin`, by id, with the arrays of `_PARTS`."""
    encoder = _encoder(tokenizer, fingerprint, sentence_tokens)
    columns: dict[str, list] = {name: [] for name in _PARTS}
    languages: dict[str, int] = {}
    names: list[list[str]] = []
    cut = dropped = 0
    with open(folder / "samples.bin", "wb") as file:
        for id_, versions, pieces, cut_here in _tokenised(read_groups(parts, bucket), encoder):
            cut += cut_here
            kept = {d.lang: p for d, p in zip(versions, pieces, strict=True) if p}
            dropped += len(versions) - len(kept)
            if not kept:
                continue
            data = encode_group(id_, kept)
            file.write(data)
            categories = list(dict.fromkeys(name for version in versions for name in version.categories))
            names.append(categories)
            columns["group_bytes"].append(len(data))
            columns["group_rank"].append(_hash(id_))
            columns["group_documents"].append(len(kept))
            columns["group_categories"].append(len(categories))
            columns["category"] += map(_hash, categories)
            for language, sentences in kept.items():
                columns["document_language"].append(languages.setdefault(language, len(languages)))
                columns["document_sentences"].append(len(sentences))
                columns["document_tokens"].append(sum(map(len, sentences)))
    for name, dtype in _PARTS.items():
        np.save(folder / f"{name}.npy", np.array(columns[name], dtype=dtype))
    (folder / "languages.json").write_text(json.dumps(list(languages)), encoding="utf-8")
    (folder / "categories.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    return {
        "groups": len(names),
        "documents": len(columns["document_tokens"]),
        "sentences": sum(columns["document_sentences"]),
        "tokens": sum(columns["document_tokens"]),
        "cut": cut,
        "dropped": dropped,
    }


def _tokenised(groups: Iterable[tuple[str, list[Document]]], encoder: SentenceTokenizer) -> Iterator[tuple]:
    """(id, versions, token pieces of each version, long sentences cut) of every group."""
    groups = iter(groups)
    while chosen := [group for _, group in zip(range(TOKENISE_AT_ONCE), groups, strict=False)]:
        flat = [document for _, versions in chosen for document in versions]
        sentences = [list(d.sentences) or split_sentences(d.text, d.lang) for d in flat]
        encoded = iter(zip(encoder.encode(sentences), sentences, strict=True))
        for id_, versions in chosen:
            pairs = [next(encoded) for _ in versions]
            cut = sum(max(0, len(pieces) - len(whole)) for pieces, whole in pairs)
            yield id_, versions, [pieces for pieces, _ in pairs], cut


def choose_clusters(categories: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[g] the place in `categories` of each group's cluster, -1 for none: its smallest category that it shares.

    Of two that are alike in size the later one, for lists of categories go from the general to the specific.

    Args:
        categories: [c] hashes, those of one group together.
        counts: [g] number of each group's categories.
    """
    ordered = np.sort(categories)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, dtype=int)
    values, sizes = ordered[starts], np.diff(np.r_[starts, len(ordered)])
    size = sizes[np.searchsorted(values, categories)] if len(ordered) else np.zeros(0, dtype=int)
    group = np.repeat(np.arange(len(counts)), counts)
    shared = np.flatnonzero(size > 1)
    best = shared[np.lexsort((-shared, size[shared], group[shared]))]
    first = np.r_[True, group[best][1:] != group[best][:-1]] if len(best) else np.zeros(0, dtype=bool)
    cluster = np.full(len(counts), -1)
    cluster[group[best[first]]] = best[first]
    return cluster


def _order(folder: Path, parts: Sequence[Path], shard_bytes: int) -> tuple[int, list[str]]:
    """Step: cluster, shard and row of every group, and all columns in this order.

    Returns the number of shards and the names of the clusters.
    """
    whole = {name: np.concatenate([np.load(part / f"{name}.npy") for part in parts]) for name in _PARTS}
    groups_of = [len(np.load(part / "group_bytes.npy", mmap_mode="r")) for part in parts]
    counts = whole["group_categories"].astype(np.int64)
    place = choose_clusters(whole["category"], counts)
    clusters, cluster = _clusters(parts, place, np.cumsum(counts) - counts, whole["category"])
    # Siblings lie together. Ties of the hash fall to the bucket, which the id alone decides, and the order of ids in it.
    order = np.lexsort((whole["group_rank"], cluster))
    # A group begins a new shard where its last byte would pass the limit.
    ends, starts = np.cumsum(whole["group_bytes"][order], dtype=np.int64), [0]
    while True:
        before = ends[starts[-1] - 1] if starts[-1] else 0
        # One that is larger than a shard has a shard of its own.
        following = max(int(np.searchsorted(ends, before + shard_bytes, "right")), starts[-1] + 1)
        if following >= len(order):
            break
        starts.append(following)
    shard = np.zeros(len(order), dtype=np.uint32)
    shard[starts[1:]] = 1
    shard = np.cumsum(shard, dtype=np.uint32)
    part_of = np.repeat(np.arange(len(parts), dtype=np.uint32), groups_of)
    row_of = np.concatenate([np.arange(count, dtype=np.uint32) for count in groups_of])
    languages, language = _languages(parts, whole["document_language"])
    columns = {
        "part": part_of[order],
        "part_row": row_of[order],
        "group_shard": shard,
        "group_row": np.arange(len(order)) - np.array(starts)[shard],
        "group_bytes": whole["group_bytes"][order],
        "group_cluster": cluster[order],
    }
    documents = _ragged(order, whole["group_documents"])
    columns["group_documents"] = np.r_[0, np.cumsum(whole["group_documents"][order], dtype=np.int64)]
    columns["document_language"] = language[documents]
    columns["document_sentences"] = whole["document_sentences"][documents]
    columns["document_tokens"] = whole["document_tokens"][documents]
    columns["group_categories"], columns["category"] = _shared_categories(whole["category"], counts, order)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column.astype(COLUMNS.get(name, np.uint32)))
    (folder / "languages.json").write_text(json.dumps(languages), encoding="utf-8")
    return len(starts), clusters


def _ragged(order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The positions of the entries of all groups in `order`, where group g has counts[g] entries lying together."""
    counts = counts.astype(np.int64)
    first, chosen = (np.cumsum(counts) - counts)[order], counts[order]
    return np.repeat(first - (np.cumsum(chosen) - chosen), chosen) + np.arange(chosen.sum())


def _shared_categories(categories: np.ndarray, counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns `group_categories` and `category`: what at least two groups share, numbered by hash."""
    _, number, size = np.unique(categories, return_inverse=True, return_counts=True)
    shared = size[number] > 1
    numbers = np.cumsum(size > 1) - 1
    entries = _ragged(order, counts)
    entries = entries[shared[entries]]
    per_group = np.bincount(np.repeat(np.arange(len(counts)), counts)[shared], minlength=len(counts))
    return np.r_[0, np.cumsum(per_group[order])], numbers[number[entries]]


def _clusters(
    parts: Sequence[Path], place: np.ndarray, first: np.ndarray, categories: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """The names of the clusters, sorted, "" before all, and the number of each group's."""
    has = place >= 0
    hashes, inverse = np.unique(categories[place[has]], return_inverse=True)
    name_of: dict[int, str] = {}
    group = 0
    for part in parts:
        for names in json.loads((part / "categories.json").read_text(encoding="utf-8")):
            if place[group] >= 0:
                name_of.setdefault(int(categories[place[group]]), names[place[group] - first[group]])
            group += 1
    clusters = ["", *sorted(name_of.values())]
    number = {name: n for n, name in enumerate(clusters)}
    cluster = np.full(len(place), NO_CLUSTER, dtype=np.uint32)
    cluster[has] = np.array([number[name_of[int(h)]] for h in hashes], dtype=np.uint32)[inverse]
    return clusters, cluster


def _languages(parts: Sequence[Path], column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """All languages, and the column of documents with their numbers instead of those of each part."""
    lists = [json.loads((part / "languages.json").read_text(encoding="utf-8")) for part in parts]
    languages = sorted({language for of_part in lists for language in of_part})
    number = {language: n for n, language in enumerate(languages)}
    renumbered, start = np.empty(len(column), dtype=np.uint16), 0
    for part, of_part in zip(parts, lists, strict=True):
        stop = start + len(np.load(part / "document_tokens.npy", mmap_mode="r"))
        table = np.array([number[language] for language in of_part], dtype=np.uint16)
        renumbered[start:stop] = table[column[start:stop]] if len(table) else 0
        start = stop
    return languages, renumbered


def _samples(number: int, parts: Sequence[Path], order: Path) -> Iterator[tuple[int, bytes]]:
    """(number, sample) of the groups of one shard, in order; one shard is in memory."""
    shard = np.load(order / "group_shard.npy", mmap_mode="r")
    start, stop = np.searchsorted(shard, [number, number + 1])
    part = np.load(order / "part.npy", mmap_mode="r")[start:stop]
    row = np.load(order / "part_row.npy", mmap_mode="r")[start:stop]
    samples: list[bytes] = [b""] * int(stop - start)
    for chosen in np.unique(part):
        sizes = np.load(parts[chosen] / "group_bytes.npy").astype(np.int64)
        first = np.cumsum(sizes) - sizes
        with open(parts[chosen] / "samples.bin", "rb") as file:
            for place in np.flatnonzero(part == chosen):
                samples[place] = os.pread(file.fileno(), int(sizes[row[place]]), int(first[row[place]]))
    yield from enumerate(samples, start=int(start))


def _write_mds(folder: Path, number: int, parts: Sequence[Path], order: Path) -> dict:
    """Step: one shard by mosaicml-streaming's writer, with one `bytes` column."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"group": "bytes"}, size_limit=None, progress_bar=False) as writer:
        for _, data in _samples(number, parts, order):
            writer.write({"group": data})
    (entry,) = json.loads((folder / "mds" / "index.json").read_text(encoding="utf-8"))["shards"]
    path = folder / f"shard.{number:05d}.mds"
    (folder / "mds" / entry["raw_data"]["basename"]).rename(path)
    shutil.rmtree(folder / "mds")
    entry["raw_data"]["basename"] = path.name
    np.save(folder / "offsets.npy", np.zeros(entry["samples"], dtype=np.uint64))
    return {"file": _fingerprint(path), "index": entry}


def _write_wds(folder: Path, number: int, parts: Sequence[Path], order: Path) -> dict:
    """Step: one shard by webdataset's writer, one `.bin` member a sample; offsets are read back from the tar."""
    from webdataset import TarWriter

    path = folder / f"shard-{number:05d}.tar"
    # mtime=0: webdataset's default (a float) costs a PAX header per member and makes equal inputs unequal files.
    with open(path, "wb") as file, TarWriter(file, mtime=0) as writer:
        for key, data in _samples(number, parts, order):
            writer.write({"__key__": f"{key:09d}", "bin": data})
    with tarfile.open(path, "r:") as tar:
        np.save(folder / "offsets.npy", np.array([member.offset_data for member in tar], dtype=np.uint64))
    return {"file": _fingerprint(path), "index": None}


_WRITERS = {"mds": _write_mds, "wds": _write_wds}
CONTAINERS = tuple(_WRITERS)


def _finish(
    folder: Path, shards: Sequence[Path], entries: Sequence[dict | None], order: Path, tokenizer: Path, manifest: dict
) -> None:
    """Step: the shard set as a whole; `manifest` lacks only what is known of its columns and tokenizer."""
    for source, file in zip(shards, manifest["shards"], strict=True):
        os.link(source / file["name"], folder / file["name"])
    if manifest["container"] == "mds":
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))
    (folder / "columns").mkdir()
    for name in COLUMNS:
        if name != "group_offset":
            os.link(order / f"{name}.npy", folder / "columns" / f"{name}.npy")
    np.save(folder / "columns" / "group_offset.npy", np.concatenate([np.load(s / "offsets.npy") for s in shards]))
    shutil.copytree(tokenizer, folder / "tokenizer")
    manifest |= {
        "tokenizer": _fingerprint(folder / "tokenizer" / "tokenizer.json"),
        "tokenizer_files": [_fingerprint(path) for path in sorted((folder / "tokenizer").iterdir()) if path.is_file()],
        "columns": [_fingerprint(folder / "columns" / f"{name}.npy") for name in COLUMNS],
    }
    if manifest["container"] == "mds":
        manifest["index"] = _fingerprint(folder / "index.json")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
