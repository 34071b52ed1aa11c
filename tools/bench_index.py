"""How fast, how small and how exact is an index of many documents? Made-up vectors, real build and search.

generate: vectors like those of an encoder, not of a random number generator. Documents belong to topics of unequal size
(Zipf) in a space of --latent dimensions whose variances fall off; versions of a document in four languages lie near each
other; all share a common direction; a little noise fills the whole width. Queries are fifth versions, not in the index.
run: builds an index of them with tools/build_index.py, searches it with the queries, and compares with exact search. Build
and search are processes of their own; their memory is the peak of what was resident, mapped files included.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import InputError, argument_parser, output_folder, positive, progress, run_command
from hmde_dist.evaluation.encode import SHARD_DOCUMENTS
from hmde_dist.evaluation.search import NEIGHBOURS, DocumentIndex, merge_top
from hmde_dist.stream.vectors import VectorFile, Vectors, write_facts

LANGUAGES = ("de", "en", "fr", "ja")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/bench_index.py generate --documents 100000 --out build/bench-vectors\n"
        "  python tools/bench_index.py run --vectors build/bench-vectors --out build/bench-index",
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("generate", help="make vectors and queries")
    task.add_argument("--documents", type=positive, default=100_000, help="vectors, of all languages (%(default)s)")
    task.add_argument("--width", type=positive, default=768, help="%(default)s")
    task.add_argument("--latent", type=positive, default=96, help="dimensions of topics and documents (%(default)s)")
    task.add_argument("--queries", type=positive, default=1000, help="%(default)s")
    task.add_argument("--out", type=Path, required=True, help="folder of vectors to create")
    task = tasks.add_parser("run", help="build and search")
    task.add_argument("--vectors", type=Path, required=True, help="from generate")
    task.add_argument("--out", type=Path, required=True, help="index to create")
    task.add_argument("--factory", help="as for tools/build_index.py")
    task.add_argument("--memory-gib", type=float, default=4, help="as for tools/build_index.py (%(default)s)")
    task.add_argument("--keep", action="store_true", help="the index is there: only search it")
    task = tasks.add_parser("search", help="what run starts: search, and print numbers as JSON")
    task.add_argument("--vectors", type=Path, required=True)
    task.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.task == "generate":
        generate(args.documents, args.width, args.latent, args.queries, args.out)
    elif args.task == "search":
        print(json.dumps(search(args.vectors, args.out)))
    else:
        report(args)


class Corpus:
    """The documents of a seed: the same ones, whatever their number."""

    def __init__(self, documents: int, width: int, latent: int, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.scale = (np.arange(1, latent + 1) ** -0.5).astype(np.float32)
        self.scale /= np.linalg.norm(self.scale)
        self.basis = np.linalg.qr(self.random.normal(size=(width, latent)))[0].T.astype(np.float32)
        self.common = self.random.normal(size=width).astype(np.float32) / np.sqrt(width) * 0.8
        topics = max(8, documents // 500)
        self.topics = self._normal(topics)
        self.weights = 1 / np.arange(1, topics + 1) ** 0.7
        self.weights /= self.weights.sum()

    def _normal(self, count: int) -> np.ndarray:
        return self.random.standard_normal((count, len(self.scale)), dtype=np.float32) * self.scale

    def documents(self, count: int) -> np.ndarray:
        """[count, latent] what documents are about."""
        return self.topics[self.random.choice(len(self.topics), count, p=self.weights)] + 0.8 * self._normal(count)

    def version(self, documents: np.ndarray) -> np.ndarray:
        """[count, W] unit vectors of the documents in some language."""
        rows = (documents + 0.35 * self._normal(len(documents))) @ self.basis + self.common
        width = rows.shape[1]
        rows += self.random.standard_normal(rows.shape, dtype=np.float32) * (0.2 / np.sqrt(width))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def generate(count: int, width: int, latent: int, queries: int, out: Path) -> None:
    corpus, versions = Corpus(count, width, latent), len(LANGUAGES)
    with output_folder(out) as folder:
        parts, shards = [], []
        asked = []
        for number, first in enumerate(progress(range(0, count, SHARD_DOCUMENTS), desc="generate", unit="shard")):
            rows = min(SHARD_DOCUMENTS, count - first)
            documents = corpus.documents(-(-rows // versions))
            vectors = np.stack([corpus.version(documents) for _ in LANGUAGES], axis=1).reshape(-1, width)[:rows]
            part = folder / f"part-{number}"
            part.mkdir()
            with VectorFile(folder / f"vectors-{number:05d}.npy", width, "fp16") as file:
                file.append(vectors)
            lines = [
                json.dumps(
                    {"id": f"made:{row // versions}", "lang": LANGUAGES[row % versions], "title": f"Document {row}"}
                )
                for row in range(first, first + rows)
            ]
            (part / "documents.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            np.save(part / "lengths.npy", np.array([len(line) + 1 for line in lines], dtype=np.uint32))
            np.save(part / "languages.npy", (np.arange(rows) % versions).astype(np.uint16))
            parts.append(part)
            path = folder / f"vectors-{number:05d}.npy"
            shards.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size})
            share = queries * (first + rows) // count - queries * first // count
            asked.append(corpus.version(documents[corpus.random.choice(len(documents), share)]))
        languages = write_facts(folder, parts, [LANGUAGES] * len(parts))
        for part in parts:
            for path in part.iterdir():
                path.unlink()
            part.rmdir()
        np.save(folder / "queries.npy", np.concatenate(asked))
        manifest = {
            "model": {"name": "made up", "sha256": ""},
            "output": "document",
            "precision": "fp16",
            "documents": count,
            "rows": count,
            "width": width,
            "languages": languages,
            "shards": shards,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(f"{count} vectors and {queries} queries written to {out}")


def exact_search(vectors: Vectors, queries: np.ndarray, k: int) -> np.ndarray:
    """[Q, k] numbers of the nearest."""
    import faiss

    best = None
    for first, rows in progress(vectors.blocks(0, len(vectors)), desc="exact search", unit="block"):
        scores, found = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        best = merge_top([*([best] if best else []), (scores, found + first)], k)
    return best[1]


def search(vectors: Path, out: Path) -> dict:
    """Seconds of a batch and of single queries, peak memory, and the numbers of the results."""
    index, queries = DocumentIndex(out), np.load(vectors / "queries.npy")
    index.search(queries[:1], NEIGHBOURS)
    began = time.perf_counter()
    _, found = index.search(queries, NEIGHBOURS)
    batch = time.perf_counter() - began
    singles = []
    for query in queries[:100]:
        began = time.perf_counter()
        index.results(query[None], NEIGHBOURS)
        singles.append(time.perf_counter() - began)
    return {
        "batch": batch,
        "single": float(np.median(singles)),
        "peak_mib": peak_mib("self"),
        "found": found.tolist(),
    }


def report(args) -> None:
    vectors = Vectors(args.vectors)
    if not (args.vectors / "queries.npy").is_file():
        raise InputError(f"{args.vectors}: no queries.npy; make the vectors with generate")
    rows = [["step", "wall s", "peak MiB"]]
    if not args.keep:
        command = ["tools/build_index.py", "--vectors", args.vectors.resolve(), "--out", args.out.resolve()]
        command += ["--memory-gib", str(args.memory_gib)] + (["--factory", args.factory] if args.factory else [])
        began = time.perf_counter()
        peak = watch(subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT))
        rows.append(["build_index.py, all", f"{time.perf_counter() - began:.0f}", f"{peak}"])
    index = json.loads((args.out / "manifest.json").read_text(encoding="utf-8"))
    rows += [[f"of it {step}", f"{index[f'{step}_seconds']:.0f}", ""] for step in ("train", "add", "finish")]
    command = ["tools/bench_index.py", "search", "--vectors", args.vectors.resolve(), "--out", args.out.resolve()]
    job = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(job.stdout)
    queries = np.load(args.vectors / "queries.npy")
    began = time.perf_counter()
    exact = exact_search(vectors, queries, NEIGHBOURS)
    seconds = time.perf_counter() - began
    shares = [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(exact.tolist(), measured["found"], strict=True)]
    rows.append([f"search, {len(queries)} queries at once", f"{measured['batch']:.2f}", f"{measured['peak_mib']}"])
    rows.append(["search, one query (median), with titles", f"{measured['single']:.4f}", ""])
    rows.append([f"exact search of the {len(queries)} queries, from disk", f"{seconds:.1f}", ""])
    print(markdown(rows))
    print(
        f"{index['factory']}, effort {index['effort']}, {index['bytes_per_vector']} bytes a vector; recall@{NEIGHBOURS} "
        f"{np.mean(shares):.4f} of the queries, {index[f'recall@{NEIGHBOURS}']:.4f} of documents\n{machine()}"
    )


def watch(job: subprocess.Popen) -> int:
    """Peak resident MiB of a process, from the kernel's own mark; waits for its end."""
    peak = 0
    while job.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # it ends meanwhile
            peak = peak_mib(job.pid)
        time.sleep(0.1)
    if job.returncode:
        sys.exit(job.returncode)
    return peak


def peak_mib(process: int | str) -> int:
    (line,) = [x for x in Path(f"/proc/{process}/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    run_command(main)
