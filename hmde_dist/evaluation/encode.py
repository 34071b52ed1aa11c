"""Documents -> vectors: encoding with an exported model, in memory or into a folder of memory-mapped vectors.

OUT/
  vectors.npy        [N, W] float32, unit length, in the order of the documents
  documents.jsonl    id, lang and title of each
  manifest.json      written last: model, output, counts
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from hmde_dist.command import InputError, output_folder, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.model.modeling_hmde import HMDEModel

OUTPUTS = ("document", "sentence-mean")
BLOCK = 2048  # documents sorted by length together
DOCUMENTS_PER_CALL = 32


@torch.inference_mode()
def encode_documents(model: HMDEModel, documents: Iterable[Document], output: str = "document") -> Iterator[np.ndarray]:
    """Vectors [W] (fp32) of documents, in their order, in constant memory.

    Args:
        output: "document" for the document vector, "sentence-mean" for the mean of the sentence vectors below it.
    """
    documents = iter(documents)
    bar = progress(desc="encode", unit="document")
    with bar:
        while block := list(islice(documents, BLOCK)):
            encoder = model.sentence_tokenizer()
            pieces = encoder.encode(list(d.sentences) or split_sentences(d.text, d.lang) for d in block)
            vectors = np.empty((len(block), model.config.hidden_size), dtype=np.float32)
            order = sorted(range(len(block)), key=lambda i: len(pieces[i]))
            for first in range(0, len(order), DOCUMENTS_PER_CALL):
                chosen = order[first : first + DOCUMENTS_PER_CALL]
                batch = model.pack([pieces[i] for i in chosen])
                result = model(batch)
                if output == "document":
                    rows = result.documents
                else:
                    counts = torch.tensor(batch.sentence_counts)
                    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(model.device)
                    rows = torch.zeros_like(result.documents, dtype=torch.float32)
                    rows.index_add_(0, owner, result.sentences.float())
                    rows /= counts.clamp(min=1)[:, None].to(model.device)
                vectors[chosen] = rows.float().cpu().numpy()
                bar.update(len(chosen))
            yield from vectors


def encode_to_folder(model: HMDEModel, documents: Iterable[Document], output: str, out: str | Path) -> dict:
    """Encode `documents` into a folder (see the module) of unit vectors; returns its manifest."""
    width = model.config.hidden_size
    with output_folder(out) as folder:
        count = 0
        raw = folder / "vectors.raw"
        with open(raw, "wb") as vectors, open(folder / "documents.jsonl", "w", encoding="utf-8") as facts:

            def noted() -> Iterator[Document]:
                for document in documents:
                    record = {"id": document.id, "lang": document.lang, "title": document.title}
                    facts.write(json.dumps(record, ensure_ascii=False) + "\n")
                    yield document

            for vector in encode_documents(model, noted(), output):
                vectors.write((vector / max(float(np.linalg.norm(vector)), 1e-12)).astype("<f4").tobytes())
                count += 1
        array = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(count, width))
        source = np.memmap(raw, dtype="<f4", mode="r", shape=(count, width))
        for first in range(0, count, 1 << 16):
            array[first : first + (1 << 16)] = source[first : first + (1 << 16)]
        array.flush()
        del source
        raw.unlink()
        manifest = {"documents": count, "width": width, "output": output, "model": Path(model.config.name_or_path).name}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def open_vectors(folder: str | Path) -> tuple[np.ndarray, list[dict]]:
    """Memory-mapped vectors and the facts of their documents."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder}: no folder of vectors (manifest.json is missing); make one with tools/encode.py")
    facts = [json.loads(line) for line in open(folder / "documents.jsonl", encoding="utf-8")]
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    if len(vectors) != len(facts):
        raise InputError(f"{folder}: {len(vectors)} vectors for {len(facts)} documents; encode again")
    return vectors, facts
