"""What a rank's memory holds, by what it is for: on a CPU the whole process, on a GPU the device and the host beside it.

Owns the table of copies: how often all parameters lie in memory under each ZeRO stage, whole on every rank or divided among them,
as DeepSpeed 0.19 and this project make them (everything is fp32). Some copies stay, others are there in one phase of a
step or run; the fullest phase decides. `docs/scaling.md` has plan and measurement side by side, on CPUs; no GPU was measured.
Left out: batches that wait for their turn, the document encoder's activations, and loader processes, which are processes of their own.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from hmde_dist.engine.deepspeed_engine import BUCKET
from hmde_dist.engine.forecast import FP32, Batch, Model

ALL_AT_ONCE = 500_000_000  # elements that DeepSpeed reduces at once where there is no ZeRO
# Measured on CPUs with a model of 0.4 million parameters: what a process that has imported everything grows by until the end.
STARTED = 95 << 20
# Measured on CPUs: glibc keeps freed blocks below 32 MiB, which most tensors are, for later ones that may not fit into them.
KEPT_BY_ALLOCATOR = 0.25


class Copies(NamedTuple):
    """Copies of all parameters: whole on every rank, divided among the ranks, and buffers of `BUCKET` elements at most."""

    whole: int = 0
    shared: int = 0
    buckets: int = 0

    def bytes(self, parameters: int, world: int, bucket: int = BUCKET) -> int:
        return FP32 * (
            self.whole * parameters
            + math.ceil(self.shared * parameters / world)
            + self.buckets * min(parameters, bucket)
        )


def weights(stage: int) -> Copies:
    """1 and 2: DeepSpeed's flat copy, which the parameters are views of, and the partition that Adam updates. 3: two partitions."""
    return (Copies(1), Copies(1, 1), Copies(1, 1), Copies(shared=2))[stage]


def moments(stage: int) -> Copies:
    """Adam's two."""
    return Copies(shared=2) if stage else Copies(2)


def reduction(stage: int) -> Copies:
    """What 3 keeps between steps, unlike the others: the partition of the gradients and the bucket they are reduced in."""
    return Copies(shared=1, buckets=1) if stage == 3 else Copies()


def backward(stage: int, world: int, cached: bool) -> Copies:
    """Gradients, and what reduces them.

    0: whole gradients and the flat copy that is reduced (of `ALL_AT_ONCE` elements). 1: whole gradients move into the
    bucket, which is reduced by way of a copy of itself. 2: likewise with chunks, whose gradients are added up before; else only the
    partition of the gradients is held, the bucket and its copy. 3: weights are gathered (they stay gathered up to 10 ** 9
    elements), by way of a buffer if there are several ranks; with chunks the gradients are whole until the last.
    """
    if stage < 2 or (stage == 2 and cached):
        return Copies(whole=1, buckets=1)
    if stage == 2:
        return Copies(shared=1, buckets=2)
    return Copies(whole=1 + cached, buckets=int(world > 1))


def update(stage: int) -> Copies:
    """1 and 2: the partition of the gradients, a flat copy of it, and two temporary ones of Adam's. 3: without the first, which stays."""
    return (Copies(1), Copies(shared=4), Copies(shared=4), Copies(shared=3))[stage]


HOST_COPY = Copies(shared=3)  # `saver.RankFile`: weights and moments, from the first checkpoint on
EXPORT = Copies(whole=2)  # the first rank reads all weights and builds the model
TEST_COPY = Copies(whole=1)  # the self-test's plain model on the first rank, beside a backward pass of the engine

ON_HOST = frozenset({"copy for the saver", "export"})  # the rest lies on the GPU, where there is one


@dataclass(frozen=True)
class Memory:
    """Bytes of the first rank, which holds the most, by what they are for.

    Attributes:
        held: what stays.
        phases: what is there beside it in each phase, one phase at a time.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def fullest(self) -> str:
        """The phase of the peak where all lies in one memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> dict[str, int]:
        """What is in use there."""
        return self.held | self.phases[self.fullest]

    def process(self, imported: int) -> int:
        """The peak of the process on a CPU.

        Args:
            imported: bytes of a process that has imported everything and holds nothing.
        """
        return imported + STARTED + round(sum(self.peak.values()) * (1 + KEPT_BY_ALLOCATOR))

    @property
    def device(self) -> int:
        """The most that is in use on a GPU. Not measured."""
        return sum(self.held.values()) + max(
            sum(size for name, size in parts.items() if name not in ON_HOST) for parts in self.phases.values()
        )

    @property
    def host(self) -> int:
        """The most that the host holds beside a GPU, on top of the process. Not measured."""
        return max(sum(size for name, size in parts.items() if name in ON_HOST) for parts in self.phases.values())


def memory_of(
    model: Model, batch: Batch, world: int, stage: int, bytes_each: int = 2, self_test: bool = True
) -> Memory:
    """What the first rank needs.

    Args:
        bytes_each: of a number in the activations; 4 in fp32, and on a CPU.
    """
    trained, frozen = model.trained, model.parameters - model.trained
    held = {
        "weights": weights(stage).bytes(trained, world)
        + Copies(whole=stage < 3, shared=stage == 3).bytes(frozen, world),
        "moments": moments(stage).bytes(trained, world),
        "reduction": reduction(stage).bytes(trained, world),
    }
    saver = {"copy for the saver": HOST_COPY.bytes(trained, world) + Copies(shared=1).bytes(frozen, world)}
    gradients = {
        "gradients": backward(stage, world, batch.cached(world)).bytes(trained, world, BUCKET if stage else ALL_AT_ONCE)
    }
    activations = activation_bytes(model, batch, world, bytes_each) + vector_bytes(model, batch, world)
    # Where there is no ZeRO, Adam updates one parameter after the other.
    adam = update(stage).bytes(trained, world) + (0 if stage else 2 * FP32 * model.largest)
    phases = {
        "backward pass": saver | gradients | {"activations": activations},
        "update": saver | {"gradients, and Adam's temporary copies": adam},
        "export": saver | {"export": EXPORT.bytes(model.parameters, world)},
    }
    if self_test:
        phases["self-test"] = {"plain model": TEST_COPY.bytes(model.parameters, world)} | gradients
    return Memory({name: size for name, size in held.items() if size}, phases)


def activation_bytes(model: Model, batch: Batch, world: int, bytes_each: int = 2) -> int:
    """What the backward pass of one chunk through the sentence encoder needs, in bytes.

    A layer keeps 34 bytes a token and width at two bytes a number (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1):
    18 and, for each width of the feed-forward, 4. The term of the attention scores is left out, because kernels
    compute them in tiles. Left out, too: the document encoder, whose stream is shorter by the tokens of a sentence.
    """
    tokens = batch.chunk_tokens if batch.cached(world) else math.ceil(batch.tokens / world)
    return round(tokens * model.layers * (18 * model.width + 4 * model.intermediate) * bytes_each / 2)


def vector_bytes(model: Model, batch: Batch, world: int) -> int:
    """Document vectors in fp32: those of the rank with their gradient, and the columns of all ranks with theirs."""
    return FP32 * model.width * (2 * math.ceil(batch.documents / world) + 2 * batch.documents)
