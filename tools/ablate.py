"""Recipes times seeds: trained, evaluated on the same documents, and compared in one table. Stopped anywhere, the same command goes on."""

import re
import sys
from pathlib import Path

import torch

from hmde_dist import ablation
from hmde_dist.command import DONE, FAILED, InputError, argument_parser, positive, run_command


def main() -> int:
    parser = argument_parser(
        __doc__,
        "python tools/ablate.py recipes/demo.yaml recipes/other.yaml --seeds 0 1 2 --documents build/demo/documents/test.jsonl.gz \\\n"
        "    --out build/ablation run.steps=300\n"
        "  python tools/ablate.py recipes/demo.yaml alone=recipes/demo.yaml,data.neighbours_per_batch=0 --documents … --out …",
    )
    parser.add_argument(
        "cells",
        nargs="+",
        metavar="CELL",
        help="RECIPE, or NAME=RECIPE,section.key=value,...; section.key=value by itself is for all cells",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--documents", type=Path, nargs="+", default=[], metavar="PATH", help="to evaluate on")
    parser.add_argument("--train-lang", default="en", metavar="LANG", help="of classification (%(default)s)")
    parser.add_argument("--label-field", default="categories.0", metavar="PATH", help="of documents (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all cells and the table")
    parser.add_argument("--ranks", type=positive, help="of each training (all GPUs shared by --parallel, else 2)")
    parser.add_argument("--parallel", type=positive, default=1, metavar="N", help="cells at a time (%(default)s)")
    parser.add_argument("--report-only", action="store_true", help="table and plot of the cells that are complete")
    args = parser.parse_intermixed_args()
    # A setting has a dot before its equals sign, the name of a cell has none.
    overrides = [text for text in args.cells if re.match(r"\w+\.[\w.]+=", text)]
    texts = [text for text in args.cells if text not in overrides]
    if not texts:
        raise InputError("name at least one recipe")
    ranks = args.ranks or torch.cuda.device_count() // args.parallel or 2
    cells = ablation.read_cells(texts, args.seeds, overrides, args.out)
    evaluation = ablation.Evaluation(tuple(args.documents), args.train_lang, args.label_field)
    failed = []
    if not args.report_only:
        if not args.documents:
            raise InputError("--documents is missing: name what the cells are evaluated on")
        ablation.check_cells(cells, ranks)
        evaluation.check()
        ablation.check_evaluation(evaluation, args.out)
        failed = ablation.run_cells(cells, evaluation, ranks, args.parallel)
    print(ablation.write_report(cells, args.out))
    print(f"written to {args.out}/table.md, table.json and plot.svg")
    for cell in failed:
        print(f"failed: {cell.name}, seed {cell.seed}: see {cell.folder}/log.txt", file=sys.stderr)
    return FAILED if failed else DONE


if __name__ == "__main__":
    run_command(main)
