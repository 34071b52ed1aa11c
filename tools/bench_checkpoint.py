"""What does a checkpoint cost the training? The time it waits for a save beside training, and for one that blocks.

A BERT-like encoder with fresh weights and filled moments is saved again and again: blocking (copy, write, sync, check, commit,
with nothing beside it), then while a stand-in for training multiplies matrices. Start it with torchrun for several ranks.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from hmde_dist import topology
from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import argument_parser, positive, run_command
from hmde_dist.engine.deepspeed_engine import start_engine
from hmde_dist.engine.saver import Saver
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.recipe import Recipe


def main() -> None:
    parser = argument_parser(
        __doc__, "torchrun --nproc_per_node 2 tools/bench_checkpoint.py --width 512 --layers 6 --zero-stage 2"
    )
    parser.add_argument("--width", type=positive, default=512, help="of the encoder (%(default)s)")
    parser.add_argument("--layers", type=positive, default=6, help="of the sentence encoder (%(default)s)")
    parser.add_argument("--vocabulary", type=positive, default=30_000, help="(%(default)s)")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1, help="(%(default)s)")
    parser.add_argument("--saves", type=positive, default=5, help="of each kind (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: a temporary one")
    args = parser.parse_args()
    world = topology.join()
    with tempfile.TemporaryDirectory(dir=args.folder) as own:
        folder = Path(world.gather(own)[0])  # the first rank's
        measure(args, folder, world)
        world.barrier()
    topology.leave()


def measure(args, folder: Path, world: topology.World) -> None:
    lower = {
        "model_type": "bert",
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 8,
        "intermediate_size": 4 * args.width,
        "vocab_size": args.vocabulary,
    }
    recipe = Recipe.model_validate(
        {
            "data": {"shards": "", "pairs_per_batch": world.size * 4},
            "model": {"lower": {"config": {"model_type": "bert"}}},
            "optimizer": {"learning_rate": 1e-3},
            "engine": {"zero_stage": args.zero_stage},
            "run": {"folder": str(folder), "steps": 1, "keep_checkpoints": 1},
        }
    )
    encoder = HMDEModel(HMDEConfig(lower=lower, hidden_size=args.width))
    engine = start_engine(recipe, encoder, world)
    saver = Saver(engine, recipe.run, {}, world, lambda *_, **__: None)
    blocking, copies, waits, beside, alone = [], [], [], [], []
    saver.begin({"step": 0})
    saver.finish()  # the buffer is there now
    for step in range(1, args.saves + 1):
        began = time.perf_counter()
        saver.begin({"step": step})
        saver.finish()
        blocking.append(time.perf_counter() - began)
    alone = [work(world.device) for _ in range(20)]
    for step in range(args.saves + 1, 2 * args.saves + 1):
        world.barrier()
        began = time.perf_counter()
        saver.begin({"step": step})
        copies.append(time.perf_counter() - began)
        waits.append(copies[-1])
        while saver.save is not None:
            beside.append(work(world.device))
            world.barrier()  # waiting for a slower rank is no part of the save
            began = time.perf_counter()
            saver.advance()
            waits[-1] += time.perf_counter() - began
    file = next((folder / "checkpoints").glob("step-*/rank-00000.safetensors"))
    if world.is_first:
        middle = statistics.median
        rows = [
            ["ranks, stage", "parameters", "MiB a rank", "blocking s", "copy s", "training waits s", "share"],
            [
                f"{world.size}, ZeRO {args.zero_stage}",
                f"{sum(getattr(p, 'ds_numel', p.numel()) for p in encoder.parameters()):,}",
                f"{file.stat().st_size / 2**20:.0f}",
                f"{middle(blocking):.2f}",
                f"{middle(copies):.3f}",
                f"{middle(waits):.3f}",
                f"{middle(waits) / middle(blocking):.1%}",
            ],
        ]
        print(markdown(rows))
        print(f"a step of the stand-in: {middle(alone):.3f} s alone, {middle(beside):.3f} s beside a save")
        print(machine())


def work(device: torch.device) -> float:
    """Seconds of some matrix products."""
    began = time.perf_counter()
    left = torch.randn(1024, 1024, device=device)
    for _ in range(20):
        left = torch.tanh(left @ left / 32)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(main)
