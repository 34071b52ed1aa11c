"""Recipes times seeds: trained, evaluated on the same documents, and compared in one table. Stopped anywhere, the same command goes on."""

import re
import sys
from pathlib import Path

import torch

from hmde_dist import ablation
from hmde_dist.command import DONE, FAILED, InputError, argument_parser, positive, run_command
from hmde_dist.corpus.steps import share
from hmde_dist.submission import Profile, load_profile, profile_path, step_scripts, submit_steps


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
    parser.add_argument("--ranks", type=positive, help="of each training (its share of the GPUs, else 2)")
    parser.add_argument(
        "--parallel", "--workers", type=positive, default=1, metavar="N", help="cells at a time (%(default)s)"
    )
    parser.add_argument("--report-only", action="store_true", help="table and plot of the cells that are complete")
    slurm = parser.add_argument_group("on a cluster")
    slurm.add_argument(
        "--profile", metavar="NAME", help="of slurm/profiles/, or a YAML file: submit an array, a job a cell"
    )
    slurm.add_argument("--dry-run", action="store_true", help="print the batch script; submit nothing")
    slurm.add_argument("--step", choices=ablation.STEPS, help="run cells without a table, as one of many jobs")
    slurm.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="cells I, I+N, I+2N ... (0/1: all)")
    args = parser.parse_intermixed_args()
    # A setting has a dot before its equals sign, the name of a cell has none.
    overrides = [text for text in args.cells if re.match(r"\w+\.[\w.]+=", text)]
    texts = [text for text in args.cells if text not in overrides]
    if not texts:
        raise InputError("name at least one recipe")
    profile = load_profile(profile_path(args.profile)) if args.profile else None
    gpus = profile.gpus_per_node if profile else torch.cuda.device_count()
    ranks = args.ranks or gpus // args.parallel or 2
    cells = ablation.read_cells(texts, args.seeds, overrides, args.out)
    failed = []
    if not args.report_only:
        if not args.documents:
            raise InputError("--documents is missing: name what the cells are evaluated on")
        evaluation = ablation.Evaluation(tuple(args.documents), args.train_lang, args.label_field)
        ablation.check_cells(cells, ranks)
        evaluation.check()
        if profile:
            return submit(profile, cells, evaluation, args.out, ranks, args.dry_run)
        ablation.begin(cells, evaluation, args.out)
        failed = ablation.run_cells(cells[args.share[0] :: args.share[1]], evaluation, ranks, args.parallel)
    if not args.step:
        print(ablation.write_report(cells, args.out))
        print(f"written to {args.out}/table.md, table.json and plot.svg")
    for cell in failed:
        print(f"failed: {cell.name}, seed {cell.seed}: see {cell.folder}/log.txt", file=sys.stderr)
    return FAILED if failed else DONE


def submit(profile: Profile, cells: list[ablation.Cell], evaluation, out: Path, ranks: int, dry_run: bool) -> int:
    if profile.cluster == "local":
        raise InputError("--profile local has no arrays: leave --profile out, and cells run here")
    if profile.gpus_per_node and ranks > profile.gpus_per_node:
        raise InputError(f"--ranks {ranks}: a cell has one node, and the profile gives it {profile.gpus_per_node} GPUs")
    folder = out.resolve() / "jobs"
    if dry_run:
        print(step_scripts(ablation.STEPS, profile, len(cells), folder, ranks))
        return DONE
    ablation.begin(cells, evaluation, out)
    arguments = sys.argv[1:]
    for number, text in enumerate(arguments):
        if text.partition("=")[0] == "--profile":
            del arguments[number : number + 1 + ("=" not in text)]
            break
    command = [str(Path(__file__).resolve()), *arguments, "--ranks", str(ranks)]
    (job,) = submit_steps(command, ablation.STEPS, profile, len(cells), folder, ranks).values()
    print(f"job {job}, {len(cells)} cells: logs in {folder}; the same command with --report-only makes the table")
    return DONE


if __name__ == "__main__":
    run_command(main)
