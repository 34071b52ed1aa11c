"""Texts -> the nearest documents of an index, in every language: one query, a file of them, or line by line."""

import json
import os
import sys
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, output_file, positive, run_command
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.encode import encode_windows, model_identity
from hmde_dist.evaluation.search import DocumentIndex
from hmde_dist.model.export import load_model


def main() -> None:
    parser = argument_parser(
        __doc__,
        'python tools/search_index.py --index build/index --model build/model --query "Insert a table. Choose rows."\n'
        "  python tools/search_index.py --index build/index --model build/model --queries mine.jsonl.gz --out found.jsonl",
    )
    parser.add_argument("--index", type=Path, required=True, metavar="INDEX_DIR", help="from tools/build_index.py")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="MODEL_DIR", help="the model that made its vectors"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--query", metavar="TEXT_OR_FILE", help="a document, or a file that holds one")
    which.add_argument("--queries", type=Path, metavar="PATH", help="documents, each a query: results as JSON lines")
    which.add_argument(
        "--interactive", action="store_true", help="a query on every line of the input (the default on a terminal)"
    )
    parser.add_argument("--k", type=positive, default=10, help="results (%(default)s)")
    parser.add_argument("--languages", metavar="CODE,...", help="only documents in these (default: all)")
    parser.add_argument("--out", type=Path, help="file for the results of --queries (default: printed)")
    args = parser.parse_args()
    if args.out and not args.queries:
        raise InputError("--out is for the results of --queries")
    if not (args.query is not None or args.queries or args.interactive or sys.stdin.isatty()):
        raise InputError("nothing to search for: give --query, --queries or --interactive")
    text = read_query(args.query) if args.query is not None else ""
    index = DocumentIndex(args.index)
    if index.model["sha256"] != model_identity(args.model)["sha256"]:
        raise InputError(f"{args.model} is not the model that made the vectors of {args.index} ({index.model['name']})")
    model = load_model(args.model)
    languages = args.languages.split(",") if args.languages else ()
    if args.queries:
        search_all(index, model, args.queries, args.k, languages, args.out)
    elif args.query is not None:
        show(index.results(model.encode([text]), args.k, languages)[0])
    else:
        converse(index, model, args.k, languages)


def read_query(text: str) -> str:
    """The text itself, or what is in the file of that name."""
    given = text
    if os.path.isfile(text):  # noqa: PTH113 -- a Path cannot ask this of a text that is too long for a name
        try:
            text = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{given}: not UTF-8") from None
    if not text.strip():
        raise InputError("--query is empty")
    return text


def show(results: list[dict]) -> None:
    for result in results:
        print(f"{result['rank']:>3}  {result['score']:.3f}  {result['lang']:<6} {result['id']}  {result['title']}")


def converse(index: DocumentIndex, model, k: int, languages) -> None:
    """Answer every line of the input."""
    prompt = sys.stdin.isatty()
    if prompt:
        print(f"{len(index.facts)} documents; a line is a query, an empty one ends")
    while True:
        if prompt:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        show(index.results(model.encode([line]), k, languages)[0])
        print(flush=True)


def search_all(index: DocumentIndex, model, path: Path, k: int, languages, out: Path | None) -> None:
    """One JSON line for each document of `path`: its id and language, and its results."""

    def write(file) -> None:
        for encoded in encode_windows(model, read_documents([path]), "document"):
            found = index.results(encoded.rows, k, languages)
            for document, results in zip(encoded.documents, found, strict=True):
                record = {"id": document.id, "lang": document.lang, "results": results}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    if out:
        with output_file(out) as file:
            write(file)
        print(f"results written to {out}")
    else:
        write(sys.stdout)


if __name__ == "__main__":
    run_command(main)
