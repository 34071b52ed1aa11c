"""One model of several: the mean of exported models or of a run's last checkpoints, or what lies between two (slerp)."""

import argparse
from pathlib import Path

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.model.merge import merge_models
from hmde_dist.train import export_run


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/merge.py --run runs/mine --last 2 --out build/averaged\n"
        "  python tools/merge.py --models build/a build/b --method slerp --weight 0.3 --out build/between",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--models", type=Path, nargs="+", metavar="MODEL_DIR", help="exported models of one architecture")
    what.add_argument("--run", type=Path, metavar="RUN_DIR", help="run folder, for the mean of its last checkpoints")
    parser.add_argument("--last", type=positive, metavar="K", help="with --run: how many checkpoints")
    parser.add_argument("--method", choices=("mean", "slerp"), default="mean", help="(%(default)s)")
    parser.add_argument("--weight", type=share, metavar="T", help="with slerp: of the second model, 0 to 1 (0.5)")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL_DIR", help="folder to create")
    args = parser.parse_args()
    slerp = args.method == "slerp"
    if args.weight is not None and not slerp:
        raise InputError("--weight goes with --method slerp: a mean weighs all models alike")
    if args.run:
        if slerp or not args.last:
            raise InputError("--run needs --last K and is a mean: export checkpoints first to slerp between them")
        export_run(args.run, args.out, last=args.last)
    else:
        if args.last:
            raise InputError("--last goes with --run")
        if len(args.models) < 2 or (slerp and len(args.models) > 2):
            raise InputError(f"--models: {len(args.models)} given; slerp merges two, a mean two or more")
        merge_models(args.models, args.out, (0.5 if args.weight is None else args.weight) if slerp else None)
    print(f"written to {args.out}")


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


if __name__ == "__main__":
    run_command(main)
