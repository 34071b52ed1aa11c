"""Models and folders of vectors of seconds, for the tests of encoding, indexing and searching."""

import json
import sys
from pathlib import Path

import numpy as np
from launch import Finished, environment, finish, start
from transformers import AutoConfig

from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import save_model, untrained_model
from hmde_dist.stream.vectors import VectorFile, write_facts

LANGUAGES = ("de", "en", "sw")


def small_model(tokenizer, out: Path, seed: int = 0) -> Path:
    """An exported model of width 32 that no training has seen."""
    lower = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = HMDEConfig(
        lower=lower.to_dict(),
        hidden_size=32,
        sentence_pooling="mean",
        upper_layers=1,
        upper_heads=2,
        upper_intermediate=64,
        max_sentences=6,
        sentence_tokens=24,
    )
    save_model(untrained_model(config, seed), tokenizer, out)
    return out


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around `count / 100` centres, in a space of few dimensions, with a little noise in all."""
    random, few = np.random.default_rng(seed), min(16, width)
    basis = np.linalg.qr(random.normal(size=(width, few)))[0].T
    centres = random.normal(size=(max(1, count // 100), few))
    rows = centres[random.integers(len(centres), size=count)] + 0.5 * random.normal(size=(count, few))
    rows = rows @ basis + 0.2 / np.sqrt(width) * random.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_vectors(
    folder: Path,
    rows: np.ndarray,
    precision: str = "fp32",
    shard_rows: int = 700,
    documents: list[tuple[str, str]] | None = None,
) -> Path:
    """A folder as tools/encode.py makes it: every tenth document is in "sw", the others in "de" and "en".

    Args:
        documents: id and language of each, in place of that.
    """
    if documents is None:
        documents = [(f"d{row}", LANGUAGES[2 if row % 10 == 0 else row % 2]) for row in range(len(rows))]
    folder.mkdir(parents=True)
    languages = sorted({lang for _, lang in documents} | set(LANGUAGES))
    parts, shards = [], []
    for number, first in enumerate(range(0, len(rows), shard_rows)):
        chosen, part = rows[first : first + shard_rows], folder / f"part-{number}"
        part.mkdir()
        path = folder / f"vectors-{number:05d}.npy"
        with VectorFile(path, rows.shape[1], precision) as file:
            file.append(chosen)
        shards.append({"file": path.name, "rows": len(chosen), "bytes": path.stat().st_size})
        numbers = [languages.index(lang) for _, lang in documents[first : first + len(chosen)]]
        lines = [
            json.dumps({"id": id_, "lang": lang, "title": f"t{first + row} é"}, ensure_ascii=False)
            for row, (id_, lang) in enumerate(documents[first : first + len(chosen)])
        ]
        lines = [line.encode() + b"\n" for line in lines]
        (part / "documents.jsonl").write_bytes(b"".join(lines))
        np.save(part / "lengths.npy", np.array(list(map(len, lines)), dtype=np.uint32))
        np.save(part / "languages.npy", np.array(numbers, dtype=np.uint16))
        parts.append(part)
    manifest = {
        "model": {"name": "none", "sha256": "0"},
        "output": "document",
        "precision": precision,
        "documents": len(rows),
        "width": rows.shape[1],
        "languages": write_facts(folder, parts, [languages] * len(parts)),
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def python(program: str, *arguments, launcher: list | None = None, folder: Path, seconds: float = 300) -> Finished:
    """Run a program text as a process of its own."""
    path = folder / "program.py"
    path.write_text(program, encoding="utf-8")
    return finish(start([*(launcher or [sys.executable]), path, *arguments], environment()), seconds)


def same_files(one: Path, other: Path) -> list[str]:
    """Names of the files of two folders, which hold the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []
    return names


PEAK = """
def peak_mib():
    from pathlib import Path
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
"""
