"""Prove that a recipe resumes exactly: train it for a few steps, resume it from the middle, compare losses and weights."""

import sys
import tempfile
from pathlib import Path

import torch

from hmde_dist.command import FAILED, argument_parser, positive, run_command
from hmde_dist.engine.resume_check import verify_resume
from hmde_dist.recipe import load_recipe


def main() -> int | None:
    parser = argument_parser(
        __doc__, "python tools/verify_resume.py recipes/demo.yaml --ranks 2 --other-ranks 1 --steps 6"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    devices = torch.cuda.device_count() or 2
    parser.add_argument("--ranks", type=positive, default=devices, help="default: every GPU, else 2")
    parser.add_argument("--other-ranks", type=positive, default=max(1, devices // 2), help="to resume on, too")
    parser.add_argument("--steps", type=positive, default=6, help="of the uninterrupted run")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides)
    other = args.other_ranks if args.other_ranks != args.ranks else None
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        rows = verify_resume(
            recipe, args.ranks, other, args.steps, Path(folder), lambda line: print(line, file=sys.stderr, flush=True)
        )
    print(f"{'':<22} {'batches':<10} {'loss differs by':<16} {'weights differ by':<18}")
    for row in rows:
        batches = "the same" if row.batches else "OTHERS"
        print(
            f"{row.name:<22} {batches:<10} {row.loss:<16.3g} {row.weights:<18.3g} {'ok' if row.holds else 'NOT AS PROMISED'}"
        )
    return None if all(row.holds for row in rows) else FAILED


if __name__ == "__main__":
    run_command(main)
