"""Documents -> pre-tokenised shards for training (MDS or WebDataset); one sample is one document in all its languages."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.corpus import steps
from hmde_dist.corpus.readers import add_documents_argument
from hmde_dist.corpus.shard_build import CONTAINERS, STEPS, build_shards
from hmde_dist.corpus.tokenizer import load_tokenizer


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/build_shards.py --documents build/documents/train.jsonl.gz --tokenizer build/tokenizer "
        "--out build/shards --format mds",
    )
    add_documents_argument(parser)
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_DIR", help="a fast Hugging Face tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--format", choices=CONTAINERS, required=True)
    parser.add_argument(
        "--sentence-tokens",
        type=int,
        default=126,
        help="token budget of a sentence; longer ones are cut in pieces (%(default)s)",
    )
    steps.add_arguments(parser, STEPS)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    try:
        manifest = build_shards(
            args.documents,
            tokenizer,
            args.sentence_tokens,
            args.out,
            args.format,
            args.workers,
            args.step,
            args.share,
        )
    except steps.ShareDone:
        return
    print(
        f"{manifest['groups']} groups, {manifest['documents']} documents in {len(manifest['languages'])} languages, "
        f"{manifest['tokens']:,} tokens in {len(manifest['shards'])} shards; {manifest['long_sentences_cut']} cuts in long "
        f"sentences, {manifest['dropped']['documents_without_tokens']} documents without tokens dropped; written to {args.out}"
    )


if __name__ == "__main__":
    run_command(main)
