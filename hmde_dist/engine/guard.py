"""The guard: judges a step by its loss and gradient norm before the weights move, and says what to do about a bad one.

    bad step (not finite, or far above the last ones)   -> not applied; the run goes on with the next batch
    more than `skips` of them within `window` batches    -> back to the last checkpoint from before the first of them, and over
                                                           the batches around them
    more than `rollbacks` times                          -> the run ends, with RUN/post-mortem.json

Loss and norm come in reduced over ranks, so every rank judges alike and no collective is needed. Nothing here depends on time:
a run that goes on from a checkpoint judges as the uninterrupted one would.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hmde_dist.command import output_file
from hmde_dist.recipe import GuardSection
from hmde_dist.stream.mixture import Mixture
from hmde_dist.stream.reader import GroupReader

APPLY, SKIP, ROLL_BACK, STOP = "apply", "skip", "roll back", "stop"

# Between steps of a calm run values differ by some per cent; less is no scale to judge by.
LEAST_DEVIATION = 0.1
SMALLEST = 1e-30  # has a logarithm


class Guard:
    """History of the last steps, and the batches that are passed over.

    Attributes:
        applied: [batch, loss, norm] of the last `window` applied steps.
        skipped: {batch, reason, loss, grad_norm} of the steps of the last `window` batches that were not applied.
        passed_over: [first, last] batches that rollbacks decided not to see again.
        rollbacks: so far.
    """

    def __init__(self, settings: GuardSection):
        self.settings = settings
        self.applied: list[list] = []
        self.skipped: list[dict] = []
        self.passed_over: list[list[int]] = []
        self.rollbacks = 0

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("applied", "skipped", "passed_over", "rollbacks")}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])

    # ---- which batch comes next --------------------------------------------------------------------------------------

    def next_batch(self, batch: int) -> int:
        """The first batch from position `batch` of the plan on that is not passed over."""
        for first, last in sorted(self.passed_over):
            if first <= batch <= last:
                batch = last + 1
        return batch

    def batches(self, batch: int) -> Iterator[int]:
        """All of them, without end."""
        while True:
            batch = self.next_batch(batch)
            yield batch
            batch += 1

    # ---- judging -----------------------------------------------------------------------------------------------------

    def judge(self, batch: int, loss: float, norm: float) -> tuple[str, str]:
        """What to do with the step of `batch`, whose update has not been applied, and why.

        Args:
            loss: mean over ranks.
            norm: of the gradient over all ranks, before clipping.
        """
        reason = self._problem(loss, norm)
        self.skipped = [one for one in self.skipped if one["batch"] > batch - self.settings.window]
        if not reason:
            self.applied = [*self.applied[-(self.settings.window - 1) :], [batch, loss, norm]]
            return APPLY, ""
        self.skipped.append({"batch": batch, "reason": reason, "loss": plain(loss), "grad_norm": plain(norm)})
        if len(self.skipped) <= self.settings.skips:
            return SKIP, reason
        return (ROLL_BACK if self.rollbacks < self.settings.rollbacks else STOP), reason

    def _problem(self, loss: float, norm: float) -> str:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is not finite"
        if self.settings.deviations is None or len(self.applied) < max(2, self.settings.window // 4):
            return ""
        known = np.log(np.maximum(np.array(self.applied)[:, 1:], SMALLEST))
        medians = np.median(known, axis=0)
        deviations = np.maximum(np.median(np.abs(known - medians), axis=0), LEAST_DEVIATION)
        for name, value, middle, limit in zip(
            ("loss", "gradient norm"),
            (loss, norm),
            medians,
            medians + self.settings.deviations * deviations,
            strict=True,
        ):
            if math.log(max(value, SMALLEST)) > limit:
                return f"the {name} is {value:.4g}, the median of the last {len(known)} steps {math.exp(middle):.4g}"
        return ""

    # ---- rolling back ------------------------------------------------------------------------------------------------

    @property
    def first_suspect(self) -> int:
        """The first batch that a rollback passes over."""
        return max(0, self.skipped[0]["batch"] - self.settings.margin)

    def roll_back(self, state: dict) -> None:
        """Take the history of a checkpoint, and pass over the suspects that come after it.

        Args:
            state: this guard's at that checkpoint.
        """
        passed_over = [*self.passed_over, [self.first_suspect, self.skipped[-1]["batch"]]]
        rollbacks = self.rollbacks + 1
        self.load_state_dict(state)
        self.passed_over, self.rollbacks, self.skipped = passed_over, rollbacks, []

    def post_mortem(self, path: Path, mixture: Mixture, facts: dict) -> None:
        """Write what a person needs to find the cause: the last steps, and the documents of every bad batch."""
        readers = [GroupReader(index) for index in mixture.indexes]
        bad = []
        for one in self.skipped:
            batch = mixture.batch(one["batch"])
            documents = []
            for group, pair in zip(batch.groups.tolist(), batch.documents.tolist(), strict=True):
                sample = readers[batch.source][group]
                documents.append({"id": sample.id, "languages": [sample.languages[place] for place in pair]})
            source = str(mixture.indexes[batch.source].folder)
            bad.append({**one, "source": source, "epoch": batch.epoch, "documents": documents})
        applied = [dict(zip(("batch", "loss", "grad_norm"), one, strict=True)) for one in self.applied]
        with output_file(path) as file:
            report = {**facts, "not_applied": bad, "passed_over": self.passed_over, "last_applied": applied}
            json.dump(report, file, indent=1, ensure_ascii=False)


def plain(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)
