"""Checkpoint -> a self-contained model folder for AutoModel and SentenceTransformer."""

from pathlib import Path

from hmde_dist.command import argument_parser, run_command
from hmde_dist.train import export_run


def main() -> None:
    parser = argument_parser(__doc__, "python tools/export.py build/demo/run --out build/model")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder; its newest checkpoint is exported")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best run.best_metric instead")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL_DIR", help="folder to create")
    args = parser.parse_args()
    export_run(args.run, args.out, args.best)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_command(main)
