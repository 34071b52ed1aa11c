"""Vectors -> a FAISS index for search."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.evaluation.index import build_index


def main() -> None:
    parser = argument_parser(
        __doc__, 'python tools/build_index.py --vectors build/vectors --out build/index --factory "IVF64,Flat"'
    )
    parser.add_argument("--vectors", type=Path, required=True, metavar="VECTORS_DIR", help="from tools/encode.py")
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX_DIR", help="folder to create")
    parser.add_argument("--factory", help="a FAISS factory string (by default chosen from the number of vectors)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    manifest = build_index(args.vectors, args.factory, args.device, args.out)
    print(
        f"{manifest['factory']} of {manifest['documents']} vectors, recall@10 {manifest['recall@10']:.3f}, "
        f"{manifest['bytes_per_vector']} bytes a vector, written to {args.out}"
    )


if __name__ == "__main__":
    run_command(main)
