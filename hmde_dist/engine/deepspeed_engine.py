"""The DeepSpeed engine: the configuration is generated from the recipe, never written by hand.

Owns everything DeepSpeed needs to be told so that ZeRO 0 to 3 give the same weights.
"""

import contextlib
import os

import torch
from torch import nn

from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.recipe import Recipe
from hmde_dist.stream.batch import PackedBatch
from hmde_dist.topology import World


class TrainedModule(nn.Module):
    """What the engine trains: the encoder, and the scale of the cosine where that is learned."""

    def __init__(self, encoder: HMDEModel, scale: float, trainable_scale: bool):
        super().__init__()
        self.encoder, self.initial_scale = encoder, scale
        # Relative to the initial scale: near zero bf16 is fine enough, near log(20) it is not. Shape [1]: DeepSpeed
        # cannot broadcast parameters without a dimension.
        self.log_scale_change = nn.Parameter(torch.zeros(1)) if trainable_scale else None

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Document vectors [D, W] and the scale [1] (fp32); under ZeRO-3 a trained scale exists only inside this call."""
        return self.encoder(batch).documents, self.scale()

    def scale(self) -> torch.Tensor:
        if self.log_scale_change is None:
            return torch.tensor([self.initial_scale], device=self.encoder.device)
        return self.initial_scale * self.log_scale_change.float().exp()


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors (norms, biases, [DCLS], scale) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def deepspeed_config(recipe: Recipe, world: World) -> dict:
    """The DeepSpeed configuration of a recipe."""
    engine = recipe.engine
    zero: dict = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        kept = engine.zero3_persistence
        zero["stage3_param_persistence_threshold"] = 100_000 if kept is None else kept
        # DeepSpeed's own linear would replace torch's for the whole process.
        zero["memory_efficient_linear"] = False
    config = {
        # Rows are documents: two of each pair. One micro-batch a step: gradients are reduced once.
        "train_micro_batch_size_per_gpu": 2 * recipe.data.pairs_per_batch // world.size,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["communication_data_type"] = "fp32"
    return config


def start_engine(recipe: Recipe, encoder: HMDEModel, world: World):
    """The DeepSpeed engine around the encoder, with torch's AdamW (DeepSpeed's own is compiled at first use)."""
    # Without this the first import of DeepSpeed's optimizers spends seconds in torch.compile.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed

    settings = recipe.optimizer
    module = TrainedModule(encoder, recipe.objective.scale, recipe.objective.trainable_scale)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(recipe, world))
    return engine


def set_learning_rate(engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
