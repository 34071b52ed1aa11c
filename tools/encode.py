"""Documents -> vectors of unit length, with ids, in a folder."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.encode import OUTPUTS, encode_to_folder
from hmde_dist.model.export import load_model


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/encode.py --model build/model --documents build/documents/test.jsonl.gz --out build/vectors",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL_DIR", help="an exported model")
    parser.add_argument("--documents", type=Path, nargs="+", required=True, metavar="PATH", help=".jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="VECTORS_DIR", help="folder to create")
    parser.add_argument("--output", choices=OUTPUTS, default=OUTPUTS[0], help="which vector (%(default)s)")
    args = parser.parse_args()
    manifest = encode_to_folder(load_model(args.model), read_documents(args.documents), args.output, args.out)
    print(f"{manifest['documents']} vectors of width {manifest['width']} written to {args.out}")


if __name__ == "__main__":
    run_command(main)
