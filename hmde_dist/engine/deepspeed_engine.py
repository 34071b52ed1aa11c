"""The DeepSpeed engine: the configuration is generated from the recipe, never written by hand.

Owns everything DeepSpeed needs to be told so that ZeRO 0 to 3 give the same weights. For DeepSpeed every run is one in fp32:
its own bf16 mode adds up the gradients of chunks in bf16, which loses the small ones. With `engine.precision: bf16` the
encoder computes under autocast instead; parameters, gradients, their sums and their reduction stay fp32.
"""

import contextlib
import os

import torch
from torch import Tensor, nn

from hmde_dist.command import InputError
from hmde_dist.engine.schedule import learning_rate
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.model.packed_attention import encoder_layers
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, build_objectives
from hmde_dist.recipe import Recipe
from hmde_dist.stream.batch import PackedBatch
from hmde_dist.topology import World

BUCKET = 50_000_000  # elements that are communicated at once


class TrainedModule(nn.Module):
    """What the engine trains: the encoder and the objectives."""

    def __init__(self, encoder: HMDEModel, recipe: Recipe):
        super().__init__()
        self.encoder, self.objectives = encoder, build_objectives(recipe, encoder)
        self.precision, self.weights = recipe.engine.precision, [one.weight for one in recipe.objectives]
        names = [one.name for one in recipe.objectives]
        # One that is there again is called by its number, too.
        again = [names[:place].count(name) for place, name in enumerate(names)]
        self.names = [f"{name}_{more + 1}" if more else name for name, more in zip(names, again, strict=True)]

    def forward(self, batch: PackedBatch) -> Tensor | tuple[Rows, Rows]:
        """While training, the rows of every objective and what they read of parameters; else document vectors [D, W]."""
        with torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.encoder(batch)
            if not self.training:
                return output.documents.float()
            rows, constants = {}, {}
            for number, one in enumerate(self.objectives):
                rows |= {f"{number}.{name}": row for name, row in one.rows(self.encoder, batch, output).items()}
                constants |= {f"{number}.{name}": value for name, value in one.constants().items()}
        return {name: row.float() if row.is_floating_point() else row for name, row in rows.items()}, constants

    def total_loss(self, rows: Rows, constants: Rows, ranks: Ranks | None = None) -> tuple[Tensor, list[Loss]]:
        """The weighted sum of the objectives' losses, and each. A collective; reads no parameter of the module."""
        parts = [
            one.loss(*({k.partition(".")[2]: v for k, v in d.items() if k.startswith(f"{number}.")} for d in (rows, constants)),
                     ranks=ranks or Ranks())
            for number, one in enumerate(self.objectives)
        ]  # fmt: skip
        return sum(weight * part.loss for weight, part in zip(self.weights, parts, strict=True)), parts


def parameter_groups(module: TrainedModule, recipe: Recipe) -> list[dict]:
    """What is trained, by learning rate, weight decay and the step since which it is.

    Matrices have weight decay, vectors (norms, biases, [DCLS], scale) have none. Each layer of the sentence encoder has
    the learning rate of the layer above it times `layer_decay`, embeddings that of a layer below the first.
    """
    settings, since = recipe.optimizer, recipe.model.lower.unfreeze_at_step or 0
    lower = module.encoder.lower
    layers = encoder_layers(lower)
    depth = dict.fromkeys(map(id, lower.parameters()), 0)
    depth |= {id(p): len(layers) + 1 for p in lower.embeddings.parameters()}
    depth |= {id(p): len(layers) - number for number, layer in enumerate(layers) for p in layer.parameters()}
    groups: dict[tuple, list] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            scale = settings.layer_decay ** depth.get(id(parameter), 0)
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            key = scale, decay, since if id(parameter) in depth else 0
            groups.setdefault(key, []).append(parameter)
    names = ("lr_scale", "weight_decay", "since")
    return [{"params": found, **dict(zip(names, key, strict=True))} for key, found in groups.items()]


def deepspeed_config(recipe: Recipe, world: World) -> dict:
    """The DeepSpeed configuration of a recipe."""
    engine = recipe.engine
    # Buffers of 200 MB: DeepSpeed's own are 2 GB each, as much as the weights of a large encoder.
    zero: dict = {"stage": engine.zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if engine.zero_stage == 3:
        kept = engine.zero3_persistence
        zero["stage3_param_persistence_threshold"] = 100_000 if kept is None else kept
        # DeepSpeed's own linear would replace torch's for the whole process.
        zero["memory_efficient_linear"] = False
    return {
        # Rows are documents: two of each pair. One micro-batch a step: gradients are reduced once.
        "train_micro_batch_size_per_gpu": 2 * recipe.data.pairs_per_batch // world.size,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def start_engine(recipe: Recipe, encoder: HMDEModel, world: World, frozen: bool = False):
    """The DeepSpeed engine around the encoder, with torch's AdamW (DeepSpeed's own is compiled at first use).

    Args:
        frozen: the sentence encoder keeps its weights.
    """
    if recipe.engine.compile:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise InputError("engine.compile=true would do nothing, for TORCHDYNAMO_DISABLE=1 is set: unset it")
        if encoder.lower.config.model_type == "longformer":
            raise InputError(
                "engine.compile=true cannot compile a Longformer, whose attention indexes by value: unset it"
            )
    else:
        # Without this the first import of DeepSpeed's optimizers spends seconds in torch.compile.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed

    settings = recipe.optimizer
    if frozen:
        encoder.lower.requires_grad_(False)
    if recipe.engine.activation_checkpointing:
        encoder.checkpoint_activations()
    if recipe.engine.compile:
        encoder.compile_layers()
    module = TrainedModule(encoder, recipe)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, recipe),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(recipe, world))
    return engine


def set_learning_rate(engine, recipe: Recipe, step: int) -> float:
    """Set the rate of every group for optimizer step `step`; returns that of the document encoder."""
    rate = learning_rate(recipe.optimizer, step, recipe.run.steps)
    for group in engine.optimizer.param_groups:
        # What was frozen before has a warm-up of its own.
        warm = min(1.0, (step - group["since"] + 1) / (recipe.optimizer.warmup_steps + 1)) if group["since"] else 1.0
        group["lr"] = rate * group["lr_scale"] * warm
    return rate
