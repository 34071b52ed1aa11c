"""The whole way once: documents -> tokenizer -> shards -> training -> export -> retrieval table -> report. `make demo` runs it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hmde_dist.command import InputError, argument_parser, run_command
from hmde_dist.corpus import libreoffice

ROOT = Path(__file__).resolve().parent.parent
SMALL_CORPUS = "tests/data/small_corpus.jsonl"
SENTENCE_TOKENS = 24


def main() -> None:
    parser = argument_parser(__doc__, "python tools/demo.py --documents my_documents.jsonl.gz")
    parser.add_argument("--documents", type=Path, help="documents to use in place of the LibreOffice help")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder, made anew (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of recipes/demo.yaml")
    args = parser.parse_args()
    out, recipe = args.out.resolve(), "recipes/demo.yaml"
    documents = args.documents.resolve() if args.documents else None
    if out.exists() and not (out / ".demo").exists():
        raise InputError(f"{args.out} exists and is not a folder of an earlier demo: name another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    if out.is_relative_to(ROOT):
        out = out.relative_to(ROOT)  # commands that read better; all of them run in the checkout

    vocabulary = 16_000
    if documents is None and not libreoffice.available():
        print(
            "No apt-get here: the small corpus of the repository stands in for the LibreOffice help "
            "(make demo DOCUMENTS=path.jsonl.gz takes yours)."
        )
        documents, recipe, vocabulary = SMALL_CORPUS, "recipes/demo-small.yaml", 2000
    source = "libreoffice-help" if documents is None else f"files --documents {shlex.quote(str(documents))}"
    ranks = torch.cuda.device_count() or 2
    overrides = [f"data.shards={out}/shards/train", f"data.validation={out}/shards/validation", f"run.folder={out}/run"]
    if ranks & (ranks - 1):
        overrides.append(f"data.pairs_per_batch={ranks * max(1, 64 // ranks)}")  # 3, 5, 6 or 7 GPUs
    overrides += args.overrides

    run(f"python tools/build_documents.py {source} --out {out}/documents")
    train = f"{out}/documents/train.jsonl.gz"
    run(f"python tools/train_tokenizer.py --documents {train} --vocabulary {vocabulary} --out {out}/tokenizer")
    for split in ("train", "validation"):
        run(
            f"python tools/build_shards.py --documents {out}/documents/{split}.jsonl.gz --tokenizer {out}/tokenizer "
            f"--out {out}/shards/{split} --format mds --sentence-tokens {SENTENCE_TOKENS}"
        )
    run(f"deepspeed --num_gpus {ranks} hmde_dist/train.py {recipe} {shlex.join(overrides)}")
    run(f"python tools/export.py {out}/run --out {out}/model")
    test = f"{out}/documents/test.jsonl.gz"
    run(
        f"python tools/evaluate.py retrieval --model {out}/model --documents {test} --baselines --out {out}/report.json"
    )
    run(f"python tools/report.py {out}/run --reports {out}/report.json --out {out}/report")
    print(f"TensorBoard: tensorboard --logdir {out}/run/tensorboard")


def run(command: str) -> None:
    """Print a command and run it in the checkout, with the programs beside this Python; end with its code if it fails."""
    print(f"\n$ {command}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = subprocess.run(shlex.split(command), cwd=ROOT, env=os.environ | {"PATH": path}).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)
