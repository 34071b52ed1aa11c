"""What a training would need before it is started: FLOPs, communication, time of a step, checkpoints (memory: `engine.memory`).

Pure functions of numbers; nothing is built or measured here. What they leave out they say.

Legend: bytes are whole numbers, times seconds, bandwidths bytes a second.
"""

import math
from dataclasses import dataclass

from hmde_dist.engine.deepspeed_engine import TrainedModule
from hmde_dist.engine.meter import PEAK_FLOPS, matrix_weights
from hmde_dist.stream.mixture import Mixture

FP32 = 4
# NVIDIA's data sheets: memory of a GPU, and NVLink in one direction.
GPU_BYTES = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 192e9}
NETWORK = 50e9  # a card of 400 Gb/s for each GPU
DISK = 1e9  # a parallel file system, for each rank
EFFICIENCY = 0.5  # assumed: no GPU was measured
NVLINK = {"A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9}


@dataclass(frozen=True)
class Model:
    """Sizes of a hierarchical encoder.

    Attributes:
        parameters: all of them.
        trained: those that are trained.
        largest: of the trained tensors.
        lower_weights, upper_weights: weights of the matrices that a token, or a sentence, is multiplied with.
        width, layers, intermediate: of the sentence encoder; no layers where it is frozen.
    """

    parameters: int
    trained: int
    largest: int
    lower_weights: int
    upper_weights: int
    width: int
    layers: int
    intermediate: int


@dataclass(frozen=True)
class Batch:
    """A global batch: rows are documents, `tokens` and `sentences` (with one [DCLS] a document) are over all of them."""

    documents: int
    sentences: int
    tokens: int
    chunk_tokens: int | None = None

    def cached(self, world: int) -> bool:
        """Whether a rank encodes its share in several chunks, twice (gradient cache)."""
        return self.chunk_tokens is not None and self.chunk_tokens < self.tokens / world


def model_of(module: TrainedModule) -> Model:
    """The sizes of what is trained, which may be on the meta device."""
    encoder = module.encoder
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = not any(p.requires_grad for p in encoder.lower.parameters())
    matrices = [matrix_weights(part) for part in (encoder.lower, encoder.upper)]
    settings = encoder.lower.config
    return Model(
        parameters=sum(p.numel() for p in module.parameters()),
        trained=sum(p.numel() for p in trained),
        largest=max((p.numel() for p in trained), default=0),
        lower_weights=0 if frozen else matrices[0],
        upper_weights=matrices[1],
        width=settings.hidden_size,
        layers=0 if frozen else settings.num_hidden_layers,
        intermediate=settings.intermediate_size,
    )


def batch_of(mixture: Mixture, documents: int, chunk_tokens: int | None) -> Batch:
    """A batch of `documents` documents as long as those of the first source are on average."""
    settings = mixture.settings
    kept, tokens = mixture.indexes[0].encoded(settings.windows, settings.sentences)
    return Batch(documents, round(documents * (kept.mean() + 1)), round(documents * tokens.mean()), chunk_tokens)


def step_flops(model: Model, batch: Batch) -> float:
    """FLOPs of the model in one step, all ranks: 6 a weight and token (Kaplan et al. 2020, arXiv 2001.08361, table 1).

    Attention scores and the loss are left out, as in `meter.model_flops`.
    """
    return 6.0 * (model.lower_weights * batch.tokens + model.upper_weights * batch.sentences)


def executed_flops(model: Model, batch: Batch, world: int) -> float:
    """As `step_flops`, with the forward pass that the gradient cache repeats: 8 instead of 6."""
    return step_flops(model, batch) * (8 / 6 if batch.cached(world) else 1)


def communicated_bytes(model: Model, batch: Batch, world: int, zero_stage: int) -> dict[str, int]:
    """What a rank sends in one step, by ring algorithms (ZeRO, section 7: two volumes of the weights, three at stage 3).

    Vectors: two all-gathers of columns (one a side) and one reduce-scatter of their gradients.
    """
    part = (world - 1) / world
    volumes = 3 if zero_stage >= 3 else 2
    if zero_stage == 3 and batch.cached(world):
        # Every chunk gathers the weights again, forward twice and backward once; gradients are reduced once.
        volumes = 3 * math.ceil(batch.tokens / world / batch.chunk_tokens) + 1
    return {
        "weights": round(volumes * part * FP32 * model.trained),
        "vectors": round(2 * part * FP32 * model.width * batch.documents),
    }


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: computation, and communication that nothing hides (an upper bound)."""

    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


def bandwidth(world: int, gpu: str) -> float:
    """Bytes a second that a rank sends: over NVLink inside a node of eight, else through a network card of its own."""
    return NVLINK[gpu] if world <= 8 else NETWORK


def step_time(
    model: Model, batch: Batch, world: int, zero_stage: int, gpu: str, efficiency: float = EFFICIENCY
) -> StepTime:
    """How long a step takes on `world` GPUs, if nothing hides the communication.

    Args:
        gpu: a name of `meter.PEAK_FLOPS`.
        efficiency: share of that peak which the kernels reach while they compute; to be measured on one GPU.
    """
    compute = executed_flops(model, batch, world) / world / (PEAK_FLOPS[gpu] * efficiency)
    sent = sum(communicated_bytes(model, batch, world, zero_stage).values())
    return StepTime(compute, sent / bandwidth(world, gpu))


def mfu(model: Model, batch: Batch, world: int, gpu: str, seconds: float) -> float:
    """Model FLOPs utilisation of a step of that length (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    return step_flops(model, batch) / seconds / (world * PEAK_FLOPS[gpu])


def checkpoint_bytes(model: Model) -> int:
    """fp32 weights of all, and two moments of what is trained, over all ranks."""
    return FP32 * (model.parameters + 2 * model.trained)
