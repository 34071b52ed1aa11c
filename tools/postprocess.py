"""Vectors of tools/encode.py, calibrated by language, augmented by side vectors, or truncated, in a folder of their own."""

from pathlib import Path

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.evaluation.postprocess import (
    CALIBRATION,
    STEPS,
    Folder,
    augment_folder,
    calibrate,
    fit,
    load_calibration,
    truncate_folder,
)


def main() -> None:
    parser = argument_parser(
        __doc__,
        "python tools/postprocess.py build/vectors --calibrate center --fit build/train-vectors --out build/centered\n"
        "  python tools/postprocess.py build/vectors --calibrate rotate --pivot en --out build/rotated\n"
        "  python tools/postprocess.py build/vectors --augment build/title-vectors --alpha 0.01 --out build/augmented\n"
        "  python tools/postprocess.py build/vectors --truncate 128 --out build/narrow",
    )
    parser.add_argument("vectors", type=Path, metavar="VECTORS_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="VECTORS_DIR", help="folder to create")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--calibrate",
        nargs="+",
        choices=STEPS,
        metavar="STEP",
        help="center: subtract each language's mean; scale: divide by its deviation; rotate: onto a pivot language",
    )
    what.add_argument("--calibration", type=Path, metavar="PATH", help=f"apply this {CALIBRATION}, or a folder's")
    what.add_argument("--augment", type=Path, metavar="VECTORS_DIR", help="add the side vectors of the same id")
    what.add_argument("--truncate", type=positive, metavar="N", help="keep the first N coordinates, at unit length")
    parser.add_argument(
        "--fit", type=Path, metavar="VECTORS_DIR", help="calibrate: what to fit on (default: the same vectors)"
    )
    parser.add_argument("--least", type=positive, help="calibrate: vectors that a language must have (5000)")
    parser.add_argument("--pivot", metavar="LANG", help="rotate: onto this language (default: the largest)")
    parser.add_argument("--alpha", type=float, help="augment: (1 - alpha) vector + alpha sum of side vectors (0.01)")
    args = parser.parse_args()
    if not args.calibrate and (args.fit or args.least):
        raise InputError("--fit and --least go with --calibrate")
    if args.pivot and "rotate" not in (args.calibrate or ()):
        raise InputError("--pivot goes with --calibrate rotate")
    if args.alpha is not None and not args.augment:
        raise InputError("--alpha goes with --augment")
    source = Folder.open(args.vectors)
    if args.truncate:
        truncate_folder(source, args.truncate, args.out)
    elif args.augment:
        alpha = 0.01 if args.alpha is None else args.alpha
        without = augment_folder(source, Folder.open(args.augment), alpha, args.out)
        print(f"{without} of {len(source.vectors)} documents have no side vector")
    else:
        if args.calibrate:
            fitted_on = source
            if args.fit:
                fitted_on = Folder.open(args.fit)
                source.check_fits(fitted_on)
            calibration = fit(fitted_on, args.calibrate, args.least or 5000, args.pivot)
        else:
            calibration = load_calibration(args.calibration)
        left_alone = calibrate(source, calibration, args.out)
        facts = calibration.facts
        of = f"documents shared with {facts['pivot']}" if facts["pivot"] else "vectors"
        print(f"{' and '.join(facts['steps'])}, fitted on {of}: {counts(facts['fitted'])}")
        if left_alone:
            print(f"left alone, for too few to fit on: {counts(left_alone)}")
    print(f"written to {args.out}")


def counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(numbers.items()))


if __name__ == "__main__":
    run_command(main)
