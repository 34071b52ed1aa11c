"""A run as a page for people: what it learned, by language and pair, and how it went; also as JSON and Markdown."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.evaluation.run_report import find_reports, write_report


def main() -> None:
    parser = argument_parser(__doc__, "python tools/report.py build/demo/run --reports build/demo/report.json")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder, finished or not")
    parser.add_argument(
        "--reports",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="reports of tools/evaluate.py (default: those in the run folder and beside it)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: RUN_DIR/report)")
    args = parser.parse_args()
    out = args.out or args.run / "report"
    reports = find_reports(args.run) if args.reports is None else args.reports
    write_report(args.run, reports, out)
    print(f"report: {out}/report.html (also report.md, report.json)")


if __name__ == "__main__":
    run_command(main)
