"""Documents -> vectors: encoding with an exported model, in memory or into a folder (see `stream.vectors`).

The steps of a folder (`corpus.steps` makes each of them resumable and spreads it over ranks or jobs):

    cut       each file of documents -> blocks of some thousand
    encode    each block -> a shard of vectors, and the facts of its documents
    finish    shards, facts, manifest

Memory holds the model and `WINDOW` documents with their vectors. A document is encoded beside the same others however
many ranks or jobs there are, so the bytes are the same.
"""

import functools
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import Document, parse_document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.sentences import SPLITTER_VERSION, split_sentences
from hmde_dist.corpus.steps import Build, ShareDone, file_facts
from hmde_dist.model.export import load_model
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.stream.vectors import FACTS, VectorFile, link, write_facts, write_rows
from hmde_dist.topology import World

STEPS = {"cut": True, "encode": True, "finish": False}
OUTPUTS = ("document", "sentence-mean", "sentence", "contextual")
SENTENCE_OUTPUTS = OUTPUTS[2:]  # a row is a sentence, as the model gives it; the others have unit length
SHARD_DOCUMENTS = 8192
WINDOW = 2048  # documents sorted by length together
TOKENS_PER_CALL = 1 << 14


@dataclass(frozen=True)
class Encoded:
    """Some documents and their rows."""

    documents: list[Document]
    rows: np.ndarray  # [R, W] fp32, in the order of the documents
    counts: np.ndarray  # [D] rows of each document
    sentences: np.ndarray  # [D] sentences of each document, those that the model leaves out included


def encode_documents(model: HMDEModel, documents: Iterable[Document], output: str = "document") -> Iterator[np.ndarray]:
    """The vector [W] (fp32) of each document, or of its sentences [S, W]; in their order, in constant memory.

    Args:
        output: "document" for the document vector, "sentence-mean" for the mean of the sentence vectors below it,
            "sentence" for these vectors, "contextual" for the sentences' states behind the document encoder.
    """
    for encoded in encode_windows(model, documents, output):
        if output in SENTENCE_OUTPUTS:
            yield from np.split(encoded.rows, np.cumsum(encoded.counts)[:-1])
        else:
            yield from encoded.rows


@torch.inference_mode()
def encode_windows(
    model: HMDEModel, documents: Iterable[Document], output: str, quiet: bool = False
) -> Iterator[Encoded]:
    """`documents`, `WINDOW` at a time, with their rows."""
    documents, limit = iter(documents), model.config.max_sentences
    with progress(desc="encode", unit="document", leave=False, disable=quiet) as bar:
        while window := list(islice(documents, WINDOW)):
            pieces = model.segments(list(d.sentences) or split_sentences(d.text, d.lang) for d in window)
            sentences = np.array([len(p) for p in pieces])
            kept = np.minimum(sentences, limit)
            counts = kept if output in SENTENCE_OUTPUTS else np.ones_like(kept)
            first = np.cumsum(counts) - counts
            rows = np.empty((counts.sum(), model.config.hidden_size), dtype=np.float32)
            for chosen in calls(np.array([sum(map(len, p[:limit])) for p in pieces])):
                result = model(model.pack([pieces[i] for i in chosen]))
                places = [np.arange(first[i], first[i] + counts[i]) for i in chosen]
                rows[np.concatenate(places)] = _rows(result, output, kept[chosen]).float().cpu().numpy()
                bar.update(len(chosen))
            yield Encoded(window, rows, counts, sentences)


def calls(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of documents for one call of the model each: alike in length, together at most `TOKENS_PER_CALL`.

    Args:
        tokens: [D] of each document; one that has more than the limit goes alone.
    """
    order = np.argsort(tokens, kind="stable")
    ends = np.cumsum(tokens[order] + 1)  # a document without tokens is work, too
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + TOKENS_PER_CALL, side="right")))
        yield order[start:stop]
        start = stop


def _rows(result, output: str, sentences: np.ndarray) -> torch.Tensor:
    if output == "document":
        return result.documents
    if output == "contextual":
        return result.contextual
    if output == "sentence":
        return result.sentences
    counts = torch.from_numpy(sentences).to(result.documents.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    total = torch.zeros_like(result.documents, dtype=torch.float32)
    total.index_add_(0, owner, result.sentences.float())
    return total / counts.clamp(min=1)[:, None]


@functools.cache
def model_identity(folder: Path) -> dict:
    """Name and SHA-256 of an exported model: vectors of one model say nothing to another.

    Raises:
        InputError: no exported model.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder}: no exported model (no model.safetensors); make one with tools/export.py")
    with open(path, "rb") as file:
        return {"name": folder.resolve().name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def encode_to_folder(
    model: Path,
    paths: Sequence[Path],
    output: str,
    precision: str,
    out: Path,
    only: str | None = None,
    share: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> dict:
    """Encode the documents of the files `paths` into the folder `out`; returns its manifest.

    A run that was stopped goes on where it stood.

    Args:
        model: an exported model's folder.
        paths: see `corpus.readers.read_documents`.
        output: see `encode_documents`.
        precision: "fp32", "fp16" or "bf16" on disk.
        only, share, quiet: see `corpus.steps.Build`.

    Raises:
        InputError: bad documents, no model, or vectors that the precision cannot hold.
        ShareDone: the share of step `only` is done.
    """
    paths, model = [Path(path) for path in paths], Path(model)
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file of documents")
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    identity = model_identity(model)
    settings = {
        "documents": file_facts(files),
        "model": identity["sha256"],
        "output": output,
        "precision": precision,
        "splitter": SPLITTER_VERSION,
        "shard_documents": SHARD_DOCUMENTS,
    }
    with Build(out, settings, 1, only, share, quiet) as build:
        if build.complete:
            return json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))
        blocks = build.run("cut", _cut, [(path,) for path in paths])
        blocks = [
            build.folder("cut", number) / f"{block:05d}.jsonl.gz"
            for number, count in enumerate(blocks)
            for block in range(count)
        ]
        parts = build.run("encode", _encode, [(block, model, output, precision, quiet) for block in blocks])
        folders = [build.folder("encode", number) for number in range(len(blocks))]
        manifest = {"model": identity, "output": output, "precision": precision}
        build.finish(_finish, (folders, parts, manifest))
    return json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))


def encode_on_ranks(world: World, *arguments) -> dict:
    """`encode_to_folder(*arguments)` by all ranks: each takes its share of a step, and all meet behind it. A collective."""
    for step, many in STEPS.items():
        problem = ""
        if many or world.is_first:
            try:
                share = (world.rank, world.size) if many else (0, 1)
                encode_to_folder(*arguments, only=step, share=share, quiet=not world.is_first)
            except ShareDone:
                pass
            except InputError as error:
                problem = str(error)
        if problems := world.messages(problem):
            raise InputError(problems[0])
    return json.loads((Path(arguments[-1]) / "manifest.json").read_text(encoding="utf-8"))


def _cut(folder: Path, path: Path) -> int:
    """Step: the documents of a file, checked, in blocks; returns how many blocks."""
    documents, count = read_documents([path]), 0
    while block := list(islice(documents, SHARD_DOCUMENTS)):
        # Level 1: read once, soon, and removed. A fixed mtime makes equal documents equal files.
        with gzip.GzipFile(folder / f"{count:05d}.jsonl.gz", "wb", compresslevel=1, mtime=0) as file:
            for document in block:
                file.write(replace(document, categories=()).as_json().encode() + b"\n")
        count += 1
    return count


def _read_block(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rb") as file:
        for line in file:
            yield parse_document(line, path.name)


@functools.lru_cache(maxsize=1)
def _model(folder: Path) -> HMDEModel:
    return load_model(folder)


def _encode(folder: Path, block: Path, model_folder: Path, output: str, precision: str, quiet: bool) -> dict:
    """Step: the shard of a block, the facts of its documents, and what the model left out of them."""
    model = _model(model_folder)
    lengths, counts, numbers = [], [], []
    languages: dict[str, int] = {}
    left_out = empty = 0
    with (
        VectorFile(folder / "vectors.npy", model.config.hidden_size, precision) as file,
        open(folder / "documents.jsonl", "wb") as facts,
    ):
        for encoded in encode_windows(model, _read_block(block), output, quiet):
            rows = encoded.rows
            if output not in SENTENCE_OUTPUTS:
                rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            _check_finite(rows, encoded, precision)
            file.append(rows)
            counts.append(encoded.counts)
            left_out += int(np.maximum(encoded.sentences - model.config.max_sentences, 0).sum())
            empty += int((encoded.sentences == 0).sum())
            for document in encoded.documents:
                record = {"id": document.id, "lang": document.lang, "title": document.title}
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                facts.write(line)
                lengths.append(len(line))
                numbers.append(languages.setdefault(document.lang, len(languages)))
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.uint32))
    np.save(folder / "languages.npy", np.array(numbers, dtype=np.uint16))
    np.save(folder / "counts.npy", np.concatenate(counts).astype(np.uint32))
    return {
        "documents": len(lengths),
        "rows": file.rows,
        "width": file.width,
        "languages": list(languages),
        "sentences_left_out": left_out,
        "without_tokens": empty,
    }


def _check_finite(rows: np.ndarray, encoded: Encoded, precision: str) -> None:
    # An infinite or undefined vector would spoil every search without a word.
    wrong = ~(np.abs(rows) <= (np.finfo(np.float16).max if precision == "fp16" else np.finfo(np.float32).max)).all(
        axis=1
    )
    if wrong.any():
        owner = np.repeat(np.arange(len(encoded.counts)), encoded.counts)[np.argmax(wrong)]
        document = encoded.documents[owner]
        raise InputError(
            f'document "{document.id}" ({document.lang}) has a vector that is not finite in {precision}: try --precision '
            "fp32, else the model is damaged"
        )


def _finish(folder: Path, parts: Sequence[Path], results: Sequence[dict], manifest: dict) -> None:
    """Step: the folder as a whole."""
    shards = []
    for number, (part, result) in enumerate(zip(parts, results, strict=True)):
        name = f"vectors-{number:05d}.npy"
        link(part / "vectors.npy", folder / name)
        shards.append({"file": name, "rows": result["rows"], "bytes": (folder / name).stat().st_size})
    languages = write_facts(folder, parts, [result["languages"] for result in results])
    if manifest["output"] in SENTENCE_OUTPUTS:
        write_rows(folder, parts)
    assert all((folder / name).is_file() for name in FACTS)
    totals = {
        name: sum(result[name] for result in results)
        for name in ("documents", "rows", "sentences_left_out", "without_tokens")
    }
    manifest |= {**totals, "width": results[0]["width"], "languages": languages, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
