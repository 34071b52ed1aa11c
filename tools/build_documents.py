"""Sources -> documents: writes train, validation and test files of comparable documents, split by hash of the id."""

import argparse
import sys
import tempfile
from pathlib import Path

from hmde_dist.command import DONE, FAILED, InputError, argument_parser, positive, run_command
from hmde_dist.corpus import libreoffice, steps, wikipedia
from hmde_dist.corpus.documents import FIELDS, write_splits
from hmde_dist.corpus.readers import add_documents_argument, field_source, read_documents


def main() -> int:
    parser = argument_parser(
        __doc__, "python tools/build_documents.py libreoffice-help --languages en,de,ja --out build/documents"
    )
    sources = parser.add_subparsers(dest="source", required=True)
    help_ = sources.add_parser("libreoffice-help", help="the LibreOffice help, from Debian's or Ubuntu's packages")
    help_.add_argument("--languages", default=",".join(libreoffice.LANGUAGES), help="comma-separated (%(default)s)")
    help_.add_argument("--packages", type=Path, help="a folder of packages unpacked already; nothing is fetched")
    files = sources.add_parser(
        "files",
        help="documents of your own: JSON lines, parquet, Hugging Face datasets folders, TREC text: checked and split",
    )
    add_documents_argument(files)
    files.add_argument(
        "--field", action="append", type=field_source, default=[], metavar="NAME=SOURCE",
        help=f"what the files call one of {', '.join(FIELDS)}, such as text=body; nothing behind = leaves it out",
    )  # fmt: skip
    files.add_argument("--lang", default="", metavar="CODE", help="of documents that name none, such as en")
    wiki = sources.add_parser("wikipedia", help="CirrusSearch index dumps of Wikipedias, sharpened by SQL dumps")
    wiki.add_argument("--dumps", type=Path, required=True, metavar="DIR", help="dump files at any depth, known by name")
    wiki.add_argument("--languages", required=True, help="comma-separated, such as en,de,ja")
    defaults = wikipedia.Filters()
    wiki.add_argument(
        "--min-sentences", type=positive, default=defaults.min_sentences, help="pages of fewer are stubs (%(default)s)"
    )
    wiki.add_argument(
        "--min-characters", type=positive, default=defaults.min_characters, help="and of fewer of these (%(default)s)"
    )
    wiki.add_argument("--drop-stub-templates", action="store_true", help="pages that bear a stub template are stubs")
    wiki.add_argument(
        "--max-sentences", type=positive, default=defaults.max_sentences, help="of a page that are kept (%(default)s)"
    )
    wiki.add_argument(
        "--script-share",
        type=float,
        default=defaults.script_share,
        help="of letters in the script of the language (%(default)s)",
    )
    wiki.add_argument(
        "--cap", action="append", type=cap, default=[], metavar="LANG=PAGES",
        help="most pages of a language; by default " + " ".join(f"{k}={v}" for k, v in defaults.caps.items()),
    )  # fmt: skip
    wiki.add_argument("--splitter", choices=("rules", "icu"), default="rules", help="icu needs PyICU (%(default)s)")
    wiki.add_argument("--plan", action="store_true", help="print files, bytes and expected time; read nothing")
    steps.add_arguments(wiki, wikipedia.STEPS)
    for source in (help_, files, wiki):
        source.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()

    if args.source == "wikipedia":
        return _wikipedia(args)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} exists and is not empty: remove it or name another --out")
    if args.source == "files":
        report = write_splits(read_documents(args.documents, dict(args.field), args.lang), args.out)
    else:
        report = _libreoffice(args)
    return show(report, args.out)


def show(report: dict, out: Path) -> int:
    """Print a report; the exit code says whether a source was damaged."""
    for split, counts in report["splits"].items():
        languages = " ".join(f"{language} {count}" for language, count in counts["documents"].items())
        print(f"{split:<10} {counts['groups']:>6} groups   {languages}")
    print(f"left out: {report['left_out_one_language']} ids with one language; written to {out}")
    for problem in report.get("problems", []):
        print(f"damaged: {problem}", file=sys.stderr)
    return FAILED if report.get("problems") else DONE


def cap(text: str) -> tuple[str, int]:
    language, _, pages = text.partition("=")
    if not language or not pages.isdecimal():
        raise argparse.ArgumentTypeError(f'"{text}" is no cap such as ceb=100000')
    return language, int(pages)


def _wikipedia(args) -> int:
    languages = args.languages.split(",")
    for language, _ in args.cap:
        if language not in languages:
            raise InputError(f"--cap {language}: not one of --languages {args.languages}")
    if not 0 <= args.script_share <= 1:
        raise InputError(f"--script-share {args.script_share} is not between 0 and 1")
    if args.plan:
        print(wikipedia.describe_plan(args.dumps, languages, args.workers))
        return DONE
    filters = wikipedia.Filters(
        args.min_sentences,
        args.min_characters,
        args.drop_stub_templates,
        args.max_sentences,
        args.script_share,
        wikipedia.BOT_WIKIS | dict(args.cap),
        args.splitter,
    )
    try:
        report = wikipedia.build_documents(
            args.dumps, languages, args.out, args.workers, filters, args.step, args.share
        )
    except steps.ShareDone:
        return DONE
    print_counts(report["filters"])
    return show(report, args.out)


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
