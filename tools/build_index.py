"""Vectors -> a FAISS index for search. Stopped anywhere, the same command goes on."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.corpus import steps
from hmde_dist.evaluation.index import STEPS, build_index


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/build_index.py --vectors build/vectors --out build/index\n"
        '  python tools/build_index.py --vectors build/vectors --out build/index --factory "IVF4096,PQ64"',
    )
    parser.add_argument("--vectors", type=Path, required=True, metavar="VECTORS_DIR", help="from tools/encode.py")
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX_DIR", help="folder to create")
    parser.add_argument(
        "--factory",
        help="a FAISS factory string: Flat, IVF1024,Flat, IVF4096,PQ64, HNSW32 ... (chosen by number and memory)",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=4,
        help="memory to build and search in (%(default)s); half of it for the index",
    )
    steps.add_arguments(parser, STEPS, threads=True)
    args = parser.parse_args()
    if args.workers:
        import faiss

        faiss.omp_set_num_threads(args.workers)
    try:
        manifest = build_index(
            args.vectors, args.factory, args.device, args.out, args.memory_gib, args.step, args.share
        )
    except steps.ShareDone:
        return
    seconds = sum(manifest[f"{step}_seconds"] for step in STEPS)
    print(
        f"{manifest['factory']} of {manifest['documents']} vectors in {seconds:.1f} s, recall@10 "
        f"{manifest['recall@10']:.3f} of exact search at effort {manifest['effort']}, {manifest['bytes_per_vector']} bytes "
        f"a vector, written to {args.out}"
    )


if __name__ == "__main__":
    run_command(main)
