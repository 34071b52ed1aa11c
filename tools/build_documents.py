"""Sources -> documents: writes train, validation and test files of comparable documents, split by hash of the id."""

import os
import sys
import tempfile
from pathlib import Path

from hmde_dist.command import DONE, FAILED, InputError, argument_parser, run_command
from hmde_dist.corpus import libreoffice, wikipedia
from hmde_dist.corpus.documents import read_documents, write_splits


def main() -> int:
    parser = argument_parser(
        __doc__, "python tools/build_documents.py libreoffice-help --languages en,de,ja --out build/documents"
    )
    sources = parser.add_subparsers(dest="source", required=True)
    help_ = sources.add_parser("libreoffice-help", help="the LibreOffice help, from Debian's or Ubuntu's packages")
    help_.add_argument("--languages", default=",".join(libreoffice.LANGUAGES), help="comma-separated (%(default)s)")
    help_.add_argument("--packages", type=Path, help="a folder of packages unpacked already; nothing is fetched")
    lines = sources.add_parser("jsonl", help="documents in the project's JSON-lines schema: checked and split")
    lines.add_argument("--documents", type=Path, nargs="+", required=True, metavar="PATH", help=".jsonl or .jsonl.gz")
    wiki = sources.add_parser("wikipedia", help="CirrusSearch index dumps of Wikipedias, sharpened by SQL dumps")
    wiki.add_argument("--dumps", type=Path, required=True, metavar="DIR", help="dump files at any depth, known by name")
    wiki.add_argument("--languages", required=True, help="comma-separated, such as en,de,ja")
    wiki.add_argument("--min-sentences", type=int, default=5, help="shorter pages are dropped (%(default)s)")
    wiki.add_argument("--max-sentences", type=int, default=64, help="of a page that are kept (%(default)s)")
    wiki.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    for source in (help_, lines, wiki):
        source.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} exists and is not empty: remove it or name another --out")
    if args.source == "jsonl":
        report = write_splits(read_documents(args.documents), args.out)
    elif args.source == "wikipedia":
        filters = wikipedia.Filters(args.min_sentences, args.max_sentences)
        report = wikipedia.build_documents(args.dumps, args.languages.split(","), args.out, args.workers, filters)
        print_counts(report["filters"])
    else:
        report = _libreoffice(args)
    for split, counts in report["splits"].items():
        languages = " ".join(f"{language} {count}" for language, count in counts["documents"].items())
        print(f"{split:<10} {counts['groups']:>6} groups   {languages}")
    print(f"left out: {report['left_out_one_language']} ids with one language; written to {args.out}")
    for problem in report.get("problems", []):
        print(f"damaged: {problem}", file=sys.stderr)
    return FAILED if report.get("problems") else DONE


def _libreoffice(args) -> dict:
    languages = args.languages.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        if args.packages is None:
            print("packages:", ", ".join(libreoffice.fetch(languages, folder)))
        documents, report = libreoffice.read_documents(folder, languages)
    print_counts(report)
    return write_splits(documents, args.out)


def print_counts(report: dict[str, dict[str, int]]) -> None:
    """A line a language: pages and what each filter took out."""
    for language, counts in report.items():
        print(f"{language:<6}", "  ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    run_command(main)
