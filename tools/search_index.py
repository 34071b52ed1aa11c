"""A text -> the nearest documents of an index, in every language."""

import os
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.evaluation.index import search
from hmde_dist.model.export import load_model


def main() -> None:
    parser = argument_parser(
        __doc__,
        'python tools/search_index.py --index build/index --model build/model --query "Insert a table. Choose rows."',
    )
    parser.add_argument("--index", type=Path, required=True, metavar="INDEX_DIR", help="from tools/build_index.py")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="MODEL_DIR", help="the model that made its vectors"
    )
    parser.add_argument("--query", required=True, metavar="TEXT_OR_FILE", help="a document, or a file that holds one")
    parser.add_argument("--k", type=positive, default=10, help="results (%(default)s)")
    args = parser.parse_args()
    text = args.query
    if os.path.isfile(text):  # noqa: PTH113 -- a Path cannot ask this of a text that is too long for a name
        try:
            text = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{args.query}: not UTF-8") from None
    if not text.strip():
        raise InputError("--query is empty")
    for result in search(args.index, load_model(args.model).encode([text]), args.k)[0]:
        print(f"{result['rank']:>3}  {result['score']:.3f}  {result['lang']:<6} {result['id']}  {result['title']}")


if __name__ == "__main__":
    run_command(main)
