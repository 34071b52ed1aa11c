"""Numbers for an exported model, printed and written to a report."""

import json
import time
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, output_file, run_command
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.baselines import baselines, model_scorer
from hmde_dist.evaluation.retrieval import METRICS, Candidates, language_pairs, macro, retrieval
from hmde_dist.model.export import load_model


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/evaluate.py retrieval --model build/model --documents build/documents/test.jsonl.gz --baselines",
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("retrieval", help="find each document's version in another language")
    task.add_argument("--model", type=Path, required=True, metavar="MODEL_DIR", help="an exported model")
    task.add_argument("--documents", type=Path, nargs="+", required=True, metavar="PATH", help=".jsonl or .parquet")
    task.add_argument("--pairs", help="comma-separated, such as de-en,ja-fr (default: every ordered pair)")
    task.add_argument("--baselines", action="store_true", help="also the untrained model, sentence means and TF-IDF")
    task.add_argument("--out", type=Path, default=Path("report.json"), help="report to write (%(default)s)")
    args = parser.parse_args()

    if not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    model = load_model(args.model)
    documents = list(read_documents(args.documents))
    candidates = Candidates([d.id for d in documents], [d.lang for d in documents])
    keys = list(zip(candidates.ids, candidates.languages, strict=True))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f'document "{twice[0]}" occurs twice in "{twice[1]}": keep one')
    pairs = language_pairs(candidates, args.pairs.split(",") if args.pairs else None)
    systems = {"HMDE": lambda documents: model_scorer(model, documents)} | (baselines(model) if args.baselines else {})
    report = {"task": "retrieval", "model": str(args.model), "documents": len(documents), "systems": {}}
    for name, scorer in systems.items():
        began = time.perf_counter()
        results = retrieval(candidates, scorer(documents), pairs)
        report["systems"][name] = {
            "macro": macro(results),
            "seconds": round(time.perf_counter() - began, 2),
            "pairs": results,
        }
    with output_file(args.out) as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
    print_table(report)
    print(f"written to {args.out}")


def print_table(report: dict) -> None:
    """The macro averages of every system."""
    first = next(iter(report["systems"].values()))
    width = max(map(len, report["systems"]))
    print(f"{'':<{width}}  " + "  ".join(f"{metric:>7}" for metric in METRICS))
    for name, system in report["systems"].items():
        print(f"{name:<{width}}  " + "  ".join(f"{system['macro'][metric]:>7.3f}" for metric in METRICS))
    print(f"macro average over {len(first['pairs'])} language pairs, {first['macro']['queries']} queries")


if __name__ == "__main__":
    run_command(main)
