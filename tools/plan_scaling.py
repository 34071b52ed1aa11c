"""What HMDE's training would take on 1 to 1,024 GPUs: the table of docs/scaling.md, by the same functions as `train.py --plan`.

LaBSE's sizes below two layers, both trained; documents of 32 full sentences of 128 tokens; as many pairs for each GPU
whatever their number, in chunks. Reads no data and needs no GPU: nothing in the table was measured.
"""

import torch

from hmde_dist.benchmark import markdown
from hmde_dist.command import argument_parser, positive, run_command
from hmde_dist.corpus.synthetic import VOCABULARY
from hmde_dist.engine import forecast
from hmde_dist.engine.deepspeed_engine import TrainedModule
from hmde_dist.engine.memory import memory_of
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.recipe import Recipe

SENTENCES, TOKENS = 32, 128
LABSE = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": VOCABULARY,
}
GIB = 2**30


def main() -> None:
    parser = argument_parser(__doc__, "python tools/plan_scaling.py --gpu H100 --pairs 64")
    parser.add_argument("--gpu", choices=sorted(forecast.GPU_BYTES), default="H100", help="%(default)s")
    parser.add_argument("--pairs", type=positive, default=64, help="of each GPU (%(default)s)")
    parser.add_argument("--chunk-tokens", type=positive, default=65_536, help="encoded at once (%(default)s)")
    parser.add_argument("--most", type=positive, default=1024, metavar="N", help="GPUs (%(default)s)")
    args = parser.parse_args()
    recipe = Recipe.model_validate(
        {
            "data": {"shards": "", "pairs_per_batch": args.pairs},
            "model": {"lower": {"config": LABSE}},
            "optimizer": {"learning_rate": 1e-5},
            "engine": {"precision": "bf16"},
            "run": {"folder": "run", "steps": 1},
        }
    )
    with torch.device("meta"):
        encoder = HMDEModel(HMDEConfig(lower=LABSE, hidden_size=LABSE["hidden_size"], max_sentences=SENTENCES))
        model = forecast.model_of(TrainedModule(encoder, recipe))
    print(
        f"{model.parameters:,} parameters, {model.lower_weights + model.upper_weights:,} of them in matrix products\n"
    )
    print(markdown(table(model, args.gpu, args.pairs, args.chunk_tokens, args.most)))


def table(model: forecast.Model, gpu: str, pairs: int, chunk_tokens: int, most: int) -> list[list[str]]:
    """A row for each power of two of GPUs; under ZeRO 1, and beside it memory and time under ZeRO 3."""
    rows = [
        ["GPUs", "pairs", "GiB of a GPU", "computing s", "sending s", "documents/s", "MFU", "of one GPU's speed",
         "ZeRO 3: GiB", "ZeRO 3: sending s"]
    ]  # fmt: skip
    alone, world = None, 1
    while world <= most:
        documents = 2 * pairs * world
        tokens = documents * SENTENCES * TOKENS
        batch = forecast.Batch(documents, documents * (SENTENCES + 1), tokens, chunk_tokens)
        one, three = (forecast.step_time(model, batch, world, stage, gpu) for stage in (1, 3))
        speed = documents / world / one.seconds
        alone = alone or speed
        rows.append(
            [
                f"{world:,}",
                f"{pairs * world:,}",
                f"{memory_of(model, batch, world, 1).device / GIB:.1f}",
                f"{one.compute:.2f}",
                f"{one.communication:.3f}",
                f"{documents / one.seconds:,.0f}",
                f"{forecast.mfu(model, batch, world, gpu, one.seconds):.1%}",
                f"{speed / alone:.0%}",
                f"{memory_of(model, batch, world, 3).device / GIB:.1f}",
                f"{three.communication:.3f}",
            ]
        )
        world *= 2
    return rows


if __name__ == "__main__":
    run_command(main)
