"""Numbers for an exported model, printed and written to a report. Which protocol each follows: docs/evaluation.md."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hmde_dist import topology
from hmde_dist.command import InputError, argument_parser, output_file, positive, run_command
from hmde_dist.corpus.readers import field_source, read_documents
from hmde_dist.evaluation.baselines import TFIDF, collection_systems, encoders, group_systems, tfidf
from hmde_dist.evaluation.bias import evaluate_bias
from hmde_dist.evaluation.classification import classify, linear_head
from hmde_dist.evaluation.collection import open_collection
from hmde_dist.evaluation.fine_tuning import Settings, fine_tuned
from hmde_dist.evaluation.labelled import read_labelled, read_mldoc
from hmde_dist.evaluation.mteb_tasks import DOCUMENT_TASKS, run_tasks
from hmde_dist.evaluation.postprocess import vector_systems
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
    add_classification(tasks)
    add_bias(tasks)
    add_mteb(tasks)
    args = parser.parse_args()

    if not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    try:
        report = {"task": args.task, "model": str(args.model) if args.model else None} | args.evaluate(args)
    finally:
        topology.leave()
    if topology.claimed_rank() > 0:
        return
    with output_file(args.out) as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
    args.show(report)
    print(f"written to {args.out}")


def add_task(
    tasks, name: str, evaluate, show, help: str, example: str, compared: bool = True, model: bool = True
) -> argparse.ArgumentParser:
    """A subcommand: `evaluate(args)` gives its report, `show(report)` prints it."""
    task = tasks.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  python tools/evaluate.py {name} --model build/model {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task.set_defaults(evaluate=evaluate, show=show)
    task.add_argument("--model", type=Path, required=model, metavar="MODEL_DIR", help="an exported model")
    if compared:
        task.add_argument("--baselines", action="store_true", help="also what the model must beat")
        task.add_argument(
            "--beside-models",
            type=Path,
            nargs="+",
            default=[],
            metavar="DIR",
            help="other exports or sentence-transformers",
        )
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
        model=False,
    )
    what = task.add_mutually_exclusive_group(required=True)
    what.add_argument("--documents", type=Path, nargs="+", metavar="PATH", help="comparable documents sharing their id")
    what.add_argument("--collection", type=Path, metavar="PATH", help="test collection: a YAML file or a BEIR folder")
    what.add_argument(
        "--vectors",
        type=Path,
        nargs="+",
        metavar="VECTORS_DIR",
        help="folders of vectors of the same documents, compared",
    )
    task.add_argument(
        "--query-vectors",
        type=Path,
        metavar="VECTORS_DIR",
        help="with --vectors: of the queries (default: each its own)",
    )
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
    ranked.add_argument("--beside-runs", type=Path, nargs="+", default=[], metavar="RUNS", help="runs of other systems")
    ranked.add_argument("--runs", type=Path, metavar="DIR", help="folder to write runs to, as trec_eval reads them")


def evaluate_retrieval(args) -> dict:
    pairs = args.pairs.split(",") if args.pairs else None
    if args.vectors:
        if args.model or args.baselines or args.beside_models:
            raise InputError("--vectors are compared as they lie: leave --model, --baselines and --beside-models out")
        return evaluate_groups(*vector_systems(args.vectors, args.query_vectors), pairs)
    if not args.model:
        raise InputError("--model is missing: name an exported model")
    if args.query_vectors:
        raise InputError("--query-vectors goes with --vectors")
    if args.documents:
        model = load_model(args.model)
        documents = list(read_documents(args.documents))
        return evaluate_groups(documents, group_systems(model, args.baselines, args.beside_models), pairs)
    collection = open_collection(args.collection, pairs)
    model = load_model(args.model)
    report = {"collection": str(args.collection), "depth": args.depth, "queries": args.queries}
    if args.rerank:
        report["rerank"] = {"run": str(args.rerank), "depth": args.rerank_depth}
    return report | evaluate_collection(
        collection,
        collection_systems(model, args.queries, args.baselines, args.beside_models),
        depth=args.depth,
        rerank_given=args.rerank,
        rerank_depth=args.rerank_depth,
        beside=args.beside_runs,
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


# ---- classification ----------------------------------------------------------------------------------------------


def add_classification(tasks) -> None:
    task = add_task(
        tasks,
        "classification",
        evaluate_classification,
        show_classification,
        "train a head on the documents of one language, test it on every language",
        "--documents build/documents/test.jsonl.gz --train-lang en --label-field categories.0",
    )
    what = task.add_mutually_exclusive_group(required=True)
    what.add_argument("--documents", type=Path, nargs="+", metavar="PATH", help="labelled documents")
    what.add_argument("--mldoc", type=Path, metavar="DIR", help="MLDoc as its scripts write it")
    task.add_argument(
        "--test-documents",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="to test on (default: a fifth of the ids, drawn by the seed)",
    )
    task.add_argument("--train-size", type=positive, default=1000, help="MLDoc's training set (%(default)s)")
    task.add_argument("--train-lang", required=True, metavar="LANG", help="language of the training documents")
    task.add_argument("--label-field", metavar="PATH", help="dotted path of the label or list of labels: categories.0")
    task.add_argument(
        "--field",
        action="append",
        type=field_source,
        default=[],
        metavar="NAME=SOURCE",
        help="what the documents call a field: id=celex_id",
    )
    task.add_argument("--seeds", type=positive, default=3, help="splits and trainings that are averaged (%(default)s)")
    task.add_argument(
        "--seen", metavar="LANGS", help="languages the model was trained on (default: as the export says)"
    )
    tuned = task.add_argument_group("fine-tuning (also under torchrun or deepspeed)")
    tuned.add_argument("--fine-tune", action="store_true", help="train the whole model, not only a head")
    defaults = Settings()
    tuned.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(%(default)s)")
    tuned.add_argument("--batch-documents", type=positive, default=defaults.batch_documents, help="(%(default)s)")
    tuned.add_argument("--steps", type=positive, default=defaults.steps, help="at most (%(default)s)")


def evaluate_classification(args) -> dict:
    if args.fine_tune and (args.baselines or args.beside_models):
        raise InputError("other models get linear heads on frozen vectors: evaluate them without --fine-tune")
    if args.mldoc:
        data = read_mldoc(args.mldoc, args.train_size)
    elif args.label_field:
        data = read_labelled(args.documents, args.label_field, args.test_documents, dict(args.field))
    else:
        raise InputError("--documents need --label-field, such as topic or categories.0")
    model = load_model(args.model)
    seen = args.seen.split(",") if args.seen else model.config.languages
    report = {"method": "fine-tuning" if args.fine_tune else "linear head on frozen vectors"}
    report["data"] = str(args.mldoc or ", ".join(map(str, args.documents)))
    if args.fine_tune:
        world = topology.join()
        settings = Settings(args.learning_rate, args.batch_documents, args.steps)
        systems = {"HMDE": lambda: fine_tuned(args.model, data.documents, data.many, settings, world)}
        report["settings"] = asdict(settings)
    else:
        makers = encoders(model, args.baselines, args.beside_models) | ({TFIDF: tfidf} if args.baselines else {})
        systems = {
            name: lambda encode=encode: linear_head(data.documents, encode, data.many)
            for name, encode in makers.items()
        }
    # Where the data have splits of their own, every seed would find the same linear head.
    seeds = range(1 if data.roles and not args.fine_tune else args.seeds)
    return report | classify(data, args.train_lang, systems, seeds, seen)


def show_classification(report: dict) -> None:
    many = report["many_labels"]
    for name, system in report["systems"].items():
        print(f"\n{name}: {report['method']}, trained on {report['train_language']}")
        rows = system["languages"] | {f"mean of {kind}": macro for kind, macro in system["macro"].items()}
        width = max(map(len, rows))
        print(f"{'':<{width}}  accuracy  (95 %)           macro-F1  (95 %)         " + "  micro-F1" * many)
        for row, found in rows.items():
            numbers = [
                f"{found[m]:>8.3f}  ({found[m + '_interval'][0]:.3f} to {found[m + '_interval'][1]:.3f})"
                for m in ("accuracy", "macro_f1")
            ]
            line = f"{row:<{width}}  " + "  ".join(numbers) + f"  {found['micro_f1']:>8.3f}" * many
            print(line + (f"  {found['documents']:.0f} documents, {found['kind']}" if "kind" in found else ""))
    seeds, unseen = len(report["seeds"]), report["test_documents_with_an_unseen_label"]
    print(
        f"\n{report['labels']} labels; mean over {seeds} {'seed' if seeds == 1 else 'seeds'}; intervals by bootstrap over documents"
    )
    if unseen:
        print(f"{unseen:.1%} of the test documents have a label that no training document has: they count as wrong")
    for reason, count in report["left_out"].items():
        print(f"left out: {count} {reason}")


# ---- bias --------------------------------------------------------------------------------------------------------


def add_bias(tasks) -> None:
    task = add_task(
        tasks,
        "bias",
        evaluate_of_bias,
        show_bias,
        "what the vectors favour: places in a document, languages in a pool, lengths",
        "--documents build/documents/test.jsonl.gz --baselines",
    )
    task.add_argument("--documents", type=Path, nargs="+", required=True, metavar="PATH", help="comparable documents")
    task.add_argument("--groups", type=positive, default=200, help="ids that are used, at most (%(default)s)")


def evaluate_of_bias(args) -> dict:
    model = load_model(args.model)
    tokenizer = model.sentence_tokenizer()

    def size(sentences: Sequence[str]) -> list[int]:
        """Places that each sentence takes: its pieces, or its tokens where windows are cut across sentences."""
        encoded = tokenizer.encode([sentence] for sentence in sentences)
        return [sum(map(len, pieces)) if model.windows else len(pieces) for pieces in encoded]

    return evaluate_bias(
        list(read_documents(args.documents)),
        encoders(model, args.baselines, args.beside_models),
        places=model.most_tokens if model.windows else model.config.max_sentences,
        size=size,
        count=args.groups,
    )


def show_bias(report: dict) -> None:
    for name, system in report["systems"].items():
        position, language, length = system["position"], system["language"], system["length"]
        print(f"\n{name}: {report['groups']} groups, {report['documents']} documents")
        places = "  ".join(f"place {number + 1}" for number in range(position["segments"]))
        width = max(map(len, ["of the language", *language["languages"]]))
        print(f"{'of the language':<{width}}  {places}    slope      p  same language")
        for lang, near in language["languages"].items():
            if found := position["languages"].get(lang):
                places = "  ".join(f"{cosine:>7.3f}" for cosine in found["cosine_by_place"])
                numbers = f"{places}  {found['slope']:>+7.4f}  {found['p']:>5.3f}"
            else:
                numbers = f"{'too few documents fit into the model':<{9 * position['segments'] + 14}}"
            print(f"{lang:<{width}}  {numbers}  {near['same_language']:>+13.3f}")
        if "foreign" in position["macro"]:
            print(f"a segment in another language: cosine {position['macro']['foreign']:+.3f}")
        pool = language["macro"]
        print(
            f"MRR@10 among one language {pool['MRR@10 alone']:.3f}, among all {pool['MRR@10 mixed']:.3f}; "
            f"between the languages of the answer {pool['gap']:.3f}; same language {pool['same_language']:+.3f}"
        )
        print_table({stress: found["macro"] for stress, found in length.items()}, METRICS, "queries")


# ---- mteb --------------------------------------------------------------------------------------------------------


def add_mteb(tasks) -> None:
    task = add_task(
        tasks,
        "mteb",
        evaluate_mteb,
        show_mteb,
        "tasks of MTEB (needs the extra: pip install -e '.[mteb]')",
        "--tasks documents --data build/mteb",
        compared=False,
    )
    task.add_argument(
        "--tasks",
        default="documents",
        help=f"comma-separated names, or documents (the default): {', '.join(DOCUMENT_TASKS)}",
    )
    task.add_argument("--languages", metavar="CODES", help="comma-separated, as mteb has them: deu,eng (default: all)")
    task.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="holds the datasets by their names on the hub, such as FOLDER/mteb/masakhanews (default: fetched by mteb)",
    )


def evaluate_mteb(args) -> dict:
    names = DOCUMENT_TASKS if args.tasks == "documents" else args.tasks.split(",")
    languages = args.languages.split(",") if args.languages else None
    return run_tasks(load_model(args.model), names, languages, args.data)


def show_mteb(report: dict) -> None:
    for name, task in report["tasks"].items():
        print(
            f"{name}: {task['metric']} {task['score']:.4f}, mean over {len(task['subsets'])} subsets ({task['split']})"
        )
        print("  " + "  ".join(f"{subset} {score:.4f}" for subset, score in task["subsets"].items()))


def print_table(rows: dict[str, dict[str, float]], columns, corner: str = "") -> None:
    """Numbers with three decimals, a row of them for each name."""
    width = max(map(len, (corner, *rows)))
    widths = {column: max(7, len(column)) for column in columns}
    print(f"{corner:<{width}}  " + "  ".join(f"{column:>{widths[column]}}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<{width}}  " + "  ".join(f"{row[column]:>{widths[column]}.3f}" for column in columns))


if __name__ == "__main__":
    run_command(main)
