"""Numbers for an exported model, printed and written to a report. Which protocol each follows: docs/evaluation.md."""

import argparse
import json
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, output_file, positive, run_command
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.baselines import baselines, collection_systems, model_scorer
from hmde_dist.evaluation.collection import open_collection
from hmde_dist.evaluation.ranking import MEASURES, TESTED, evaluate_collection
from hmde_dist.evaluation.retrieval import METRICS, evaluate_groups
from hmde_dist.model.export import load_model


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/evaluate.py retrieval --model build/model --documents build/documents/test.jsonl.gz --baselines",
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    add_retrieval(tasks)
    args = parser.parse_args()

    if not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    report = {"task": args.task, "model": str(args.model)} | args.evaluate(args)
    with output_file(args.out) as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
    args.show(report)
    print(f"written to {args.out}")


def add_task(tasks, name: str, evaluate, show, help: str, example: str) -> argparse.ArgumentParser:
    """A subcommand: `evaluate(args)` gives its report, `show(report)` prints it."""
    task = tasks.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  python tools/evaluate.py {name} --model build/model {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task.set_defaults(evaluate=evaluate, show=show)
    task.add_argument("--model", type=Path, required=True, metavar="MODEL_DIR", help="an exported model")
    task.add_argument("--baselines", action="store_true", help="also what the model must beat")
    task.add_argument("--out", type=Path, default=Path("report.json"), help="report to write (%(default)s)")
    return task


# ---- retrieval ---------------------------------------------------------------------------------------------------


def add_retrieval(tasks) -> None:
    task = add_task(
        tasks,
        "retrieval",
        evaluate_retrieval,
        show_retrieval,
        "find each document's version in another language, or the relevant documents of a test collection",
        "--collection clef2003.yaml --baselines --runs build/runs",
    )
    what = task.add_mutually_exclusive_group(required=True)
    what.add_argument("--documents", type=Path, nargs="+", metavar="PATH", help="comparable documents sharing their id")
    what.add_argument("--collection", type=Path, metavar="PATH", help="test collection: a YAML file or a BEIR folder")
    task.add_argument("--pairs", help="comma-separated, such as de-en,ja-fr (default: every ordered pair)")
    ranked = task.add_argument_group("with --collection")
    ranked.add_argument("--depth", type=positive, default=1000, help="documents of a ranking (%(default)s)")
    ranked.add_argument(
        "--rerank", type=Path, metavar="RUN", help="re-rank a run file, or FOLDER/PAIR.run of each pair"
    )
    ranked.add_argument("--rerank-depth", type=positive, default=100, help="documents re-ranked (%(default)s)")
    ranked.add_argument(
        "--queries",
        choices=("document", "sentence-mean"),
        default="document",
        help="vectors of topics: as documents, or of the sentence encoder alone, as in the paper (%(default)s)",
    )
    ranked.add_argument("--beside", type=Path, nargs="+", default=[], metavar="RUNS", help="runs of other systems")
    ranked.add_argument("--runs", type=Path, metavar="DIR", help="folder to write runs to, as trec_eval reads them")


def evaluate_retrieval(args) -> dict:
    pairs = args.pairs.split(",") if args.pairs else None
    if args.documents:
        model = load_model(args.model)
        documents = list(read_documents(args.documents))
        systems = {"HMDE": lambda documents: model_scorer(model, documents)}
        return evaluate_groups(documents, systems | (baselines(model) if args.baselines else {}), pairs)
    collection = open_collection(args.collection, pairs)
    model = load_model(args.model)
    report = {"collection": str(args.collection), "depth": args.depth, "queries": args.queries}
    if args.rerank:
        report["rerank"] = {"run": str(args.rerank), "depth": args.rerank_depth}
    return report | evaluate_collection(
        collection,
        collection_systems(model, args.queries, args.baselines),
        depth=args.depth,
        rerank_given=args.rerank,
        rerank_depth=args.rerank_depth,
        beside=args.beside,
        runs=args.runs,
    )


def show_retrieval(report: dict) -> None:
    systems = report["systems"]
    first = next(iter(systems.values()))
    ranked = "collection" in report
    print_table({name: system["macro"] for name, system in systems.items()}, MEASURES if ranked else METRICS)
    print(f"macro average over {len(first['pairs'])} language pairs, {first['macro']['queries']} queries")
    if not ranked:
        return
    print()
    rows = {pair: {name: s["pairs"][pair]["MAP"] for name, s in systems.items()} for pair in first["pairs"]}
    print_table(rows, list(systems), "MAP")
    for pair, reasons in report["left_out"].items():
        for reason, count in reasons.items():
            print(f"{pair}: {count} {reason}")
    for measure in TESTED:
        for other in list(systems)[1:]:
            tests = [row for row in report["significance"][measure] if row["against"] == other]
            better, worse = (
                sum(sign * row["difference"] > 0 and row["p_randomisation_holm"] < 0.05 for row in tests)
                for sign in (1, -1)
            )
            print(
                f"{measure}: significantly better than {other} in {better} of {len(tests)} pairs, worse in {worse} "
                "(randomisation test, p < 0.05 after Holm)"
            )


def print_table(rows: dict[str, dict[str, float]], columns, corner: str = "") -> None:
    """Numbers with three decimals, a row of them for each name."""
    width = max(map(len, (corner, *rows)))
    widths = {column: max(7, len(column)) for column in columns}
    print(f"{corner:<{width}}  " + "  ".join(f"{column:>{widths[column]}}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<{width}}  " + "  ".join(f"{row[column]:>{widths[column]}.3f}" for column in columns))


if __name__ == "__main__":
    run_command(main)
