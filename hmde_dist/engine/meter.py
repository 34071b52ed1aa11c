"""The meter: what a step cost and how fast it was, from counts that cannot flatter.

Tokens are real ones, padding is counted apart, and a device without a known peak has no MFU rather than a wrong one.

    MFU = model FLOPs of the steps / (seconds * peak FLOP/s of the device)
    model FLOPs of a step = 6 * (matrix weights of the sentence encoder * tokens
                                 + matrix weights of the document encoder * (sentences + documents))

What is computed twice (gradient cache, activation checkpointing) counts once, padding never.
"""

import contextlib
import time
from collections.abc import Iterator

import torch

from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.stream.loader import RankBatch

# Dense bf16 FLOP/s from the vendors' data sheets (without sparsity).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device, None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def model_flops(model: HMDEModel, batch: RankBatch) -> float:
    """FLOPs of one training step on the real tokens of `batch`: 6 per weight and token (Kaplan et al. 2020, 2001.08361).

    Embedding tables are looked up, not multiplied, and do not count; attention scores are left out (sentences are short).
    Where the sentence vectors are known already, the sentence encoder does nothing.
    """
    lower = matrix_weights(model.lower)
    upper = matrix_weights(model.upper)
    tokens = sum(chunk.tokens for chunk in batch.chunks if chunk.vectors is None)
    return 6.0 * (lower * tokens + upper * sum(len(chunk.upper_rows) for chunk in batch.chunks))


def matrix_weights(module: torch.nn.Module) -> int:
    """Weights of the matrices that every token is multiplied with."""
    # `ds_numel`: under ZeRO-3 a parameter's own size is that of its local part. A Longformer's `query_global` is for the
    # first token of a text alone.
    return sum(
        getattr(m.weight, "ds_numel", m.weight.numel())
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.Linear) and not name.endswith("query_global")
    )


class Meter:
    """Sums over the steps since the last reading."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, peak_flops(device)
        self._reset()

    def _reset(self) -> None:
        self.began = time.perf_counter()
        self.waited = self.flops = self.imbalance = 0.0
        self.documents = self.tokens = self.slots = self.steps = 0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time in this block is not training: validation, checkpoints."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def waiting(self, seconds: float) -> None:
        """Time this step spent waiting for its batch."""
        self.waited += seconds

    def count(self, batch: RankBatch, flops: float, slots: int) -> None:
        """A step was taken.

        Args:
            slots: tokens that the sentence encoder computed, padding included.
        """
        self.documents += batch.documents
        self.tokens += batch.tokens
        self.slots += slots
        self.flops += flops
        self.imbalance += batch.imbalance
        self.steps += 1

    def read(self, total) -> dict[str, float]:
        """Rates of all ranks together since the last reading. A collective.

        Args:
            total: sums a number over ranks.
        """
        seconds = time.perf_counter() - self.began
        tokens = total(self.tokens)
        reading = {
            "documents_per_second": total(self.documents) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_fraction": 1 - tokens / max(1, total(self.slots)),
            "token_imbalance": self.imbalance / max(1, self.steps),
            "data_wait_fraction": self.waited / seconds,
        }
        if self.peak is not None:
            reading["mfu"] = self.flops / seconds / self.peak
        self._reset()
        return reading
