"""Documents -> a Unigram tokenizer of their languages, saved as a Hugging Face folder."""

from pathlib import Path

from hmde_dist.command import argument_parser, positive, run_command
from hmde_dist.corpus.readers import add_documents_argument, read_documents
from hmde_dist.corpus.tokenizer import train_tokenizer


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/train_tokenizer.py --documents build/documents/train.jsonl.gz --vocabulary 16000 --out build/tokenizer",
    )
    add_documents_argument(parser)
    parser.add_argument(
        "--vocabulary", type=positive, default=32_000, help="pieces, special tokens included (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    tokenizer = train_tokenizer(read_documents(args.documents), args.vocabulary, args.out)
    print(f"{len(tokenizer)} pieces written to {args.out}")


if __name__ == "__main__":
    run_command(main)
