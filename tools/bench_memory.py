"""Is the memory that `train.py --plan` forecasts what a run on CPUs takes? Real runs beside their plans.

For every width, number of ranks and ZeRO stage a small BERT-like encoder is trained for two steps on random documents, with a
checkpoint between them and the export at the end; the peak of its fullest process is the last event of its journal. Each
run has processes of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import argument_parser, positive, progress, run_command
from hmde_dist.corpus.synthetic import synthetic_shards

TRAIN = Path(__file__).parent.parent / "hmde_dist" / "train.py"
VOCABULARY, GROUPS = 10_000, 16


def main() -> None:
    parser = argument_parser(__doc__, "python tools/bench_memory.py --widths 512 768 --ranks 1 2 4 --stages 0 1 2 3")
    parser.add_argument("--widths", type=positive, nargs="+", default=[512], metavar="W", help="of the encoder (512)")
    parser.add_argument("--layers", type=positive, default=6, help="of the sentence encoder (%(default)s)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2], metavar="N", help="1, 2 or 4 (2)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], metavar="S", help="of ZeRO (all)")
    parser.add_argument("--self-test", action="store_true", help="with engine.self_test")
    args = parser.parse_args()
    rows = [("width", "ranks", "ZeRO", "parameters", "planned GiB", "measured GiB", "planned over measured")]
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as own:
        folder = Path(own)
        shards = synthetic_shards(GROUPS, folder, VOCABULARY)
        cases = [(w, n, s) for w in args.widths for n in args.ranks for s in args.stages]
        for width, ranks, stage in progress(cases, desc="runs", unit="run"):
            recipe = write_recipe(folder / "recipe.yaml", shards, width, args.layers, args.self_test)
            parameters, planned, measured = measure(recipe, folder / f"{width}-{ranks}-{stage}", ranks, stage)
            ratio = f"{planned / measured:.2f}"
            rows.append((str(width), str(ranks), str(stage), parameters, f"{planned:.2f}", f"{measured:.2f}", ratio))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows))
    print(machine())


def write_recipe(path: Path, shards: Path, width: int, layers: int, self_test: bool) -> Path:
    lower = {"model_type": "bert", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8}
    lower |= {"intermediate_size": 4 * width, "max_position_embeddings": 132}
    tree = {
        "data": {"shards": str(shards), "pairs_per_batch": 4, "sentences": 6, "workers": 0},
        "model": {"lower": {"config": lower}, "upper": {"layers": 1, "heads": 4, "intermediate": 512}},
        "optimizer": {"learning_rate": 1e-4},
        "engine": {"chunk_tokens": 300, "self_test": self_test},
        "run": {"folder": "", "steps": 2, "checkpoint_every": 1},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def measure(recipe: Path, run: Path, ranks: int, stage: int) -> tuple[str, float, float]:
    """Parameters, and planned and measured GiB of the fullest process."""
    overrides = [str(recipe), f"run.folder={run}", f"engine.zero_stage={stage}"]
    plan = command([sys.executable, str(TRAIN), *overrides, "--plan", "--world", str(ranks)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command([*launcher, str(TRAIN), *overrides])
    done = json.loads((run / "journal.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    planned = re.search(rf"ZeRO {stage}: ([\d.]+) GiB", plan)[1]
    counts = re.search(r"model +([\d,]+) parameters in the sentence encoder, ([\d,]+)", plan)
    parameters = sum(int(count.replace(",", "")) for count in counts.groups())
    return f"{parameters:,}", float(planned), done["peak_gib"]


def command(words: Sequence[str]) -> str:
    job = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if job.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {job.returncode}\n{job.stderr[-4000:]}")
    return job.stdout


if __name__ == "__main__":
    run_command(main)
