"""Where the time of a training step goes, measured without touching the code that trains.

At every moment one part is running; `enter` ends it and begins the next, so the parts add up to the whole. What runs is known
from the sentence encoder: entered, left, and reached again by the gradient of its vectors. On a GPU every change waits for
the device, which a step that is only timed as a whole does not do.

    read             sampling, reading, decoding and packing the batch, and its way to the device
    lower forward    the sentence encoder up to its sentence vectors (twice, if the batch is encoded in chunks)
    upper + loss     the document encoder, gathering and the loss, with their backward passes
    lower backward   from the gradient of the sentence vectors on; holds DeepSpeed's reduction of the gradients
    optimizer        gradient norm, clipping, update
    other            between reading and the sentence encoder: learning rate, seeds, DeepSpeed's own bookkeeping
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from hmde_dist.model.modeling_hmde import HMDEModel

READ, LOWER_FORWARD, UPPER, LOWER_BACKWARD, OPTIMIZER, OTHER = PARTS = (
    "read",
    "lower forward",
    "upper + loss",
    "lower backward",
    "optimizer",
    "other",
)


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepParts:
    """Seconds of each part, summed over the steps inside `watching`.

    Args:
        clock: gives seconds.
    """

    def __init__(self, encoder: HMDEModel, clock: Callable[[], float] = time.perf_counter):
        self.encoder, self.clock = encoder, clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running, self._since = None, 0.0

    def enter(self, part: str | None) -> None:
        """End the part that is running and begin `part` (none: the step is over)."""
        synchronise(self.encoder.device)
        now = self.clock()
        if self._running is not None:
            self.seconds[self._running] += now - self._since
        self._running, self._since = part, now

    @contextlib.contextmanager
    def watching(self) -> Iterator["StepParts"]:
        """Steps in this block are measured."""
        encode = self.encoder.encode_sentences

        def watched(batch):
            self.enter(LOWER_FORWARD)
            vectors = encode(batch)
            if vectors.requires_grad:
                vectors.register_hook(lambda _: self.enter(LOWER_BACKWARD))
            self.enter(UPPER)
            return vectors

        self.encoder.encode_sentences = watched
        try:
            yield self
        finally:
            del self.encoder.encode_sentences
            self._running = None
