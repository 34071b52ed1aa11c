"""The guard: judges a step by its loss and gradient norm before the weights move, and says what to do about a bad one.

    bad step (not finite, or far above the last ones)   -> not applied; the run goes on with the next batch
    more than `skips` of them within `window` batches    -> back to the last checkpoint from before the first of them, and over
                                                           the batches around them
    more than `rollbacks` times                          -> the run ends, with RUN/post-mortem.json

Batches of each source are judged by their own last ones, for sources differ. A gradient norm that rises and stays, at a loss that
does not, is no spike: of batches in a row that are refused for their norm alone, the one that makes them `LEVEL` is applied,
and norms are judged anew.

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
LEVEL = 4  # norms in a row that make a new level,
ALIKE = 1.0  # if their logarithms are within this


class Guard:
    """History of the last steps, and the batches that are passed over.

    Attributes:
        applied: by source [batch, loss, norm] of its last `window` applied steps; sources are text, for JSON.
        high_norms: by source the norms of the last batches in a row that were refused for their norm alone.
        norms_since: by source the batch from which on norms are judged by.
        skipped: {batch, reason, loss, grad_norm} of the steps of the last `window` batches that were not applied.
        passed_over: [first, last] batches that rollbacks decided not to see again.
        rollbacks: so far.
    """

    def __init__(self, settings: GuardSection):
        self.settings = settings
        self.applied: dict[str, list[list]] = {}
        self.high_norms: dict[str, list[float]] = {}
        self.norms_since: dict[str, int] = {}
        self.skipped: list[dict] = []
        self.passed_over: list[list[int]] = []
        self.rollbacks = 0

    def state_dict(self) -> dict:
        names = ("applied", "high_norms", "norms_since", "skipped", "passed_over", "rollbacks")
        return {name: getattr(self, name) for name in names}

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

    def judge(self, batch: int, loss: float, norm: float, source: int = 0) -> tuple[str, str]:
        """What to do with the step of `batch`, whose update has not been applied, and why.

        Args:
            loss: mean over ranks.
            norm: of the gradient over all ranks, before clipping.
            source: that the batch is from.
        """
        source = str(source)
        reason, norm_alone = self._problem(loss, norm, source)
        self.skipped = [one for one in self.skipped if one["batch"] > batch - self.settings.window]
        high = [*self.high_norms.get(source, []), norm][-LEVEL:] if norm_alone else []
        if len(high) == LEVEL and np.ptp(np.log(high)) < ALIKE:
            reason, high, self.norms_since = "", [], self.norms_since | {source: batch}
        self.high_norms = self.high_norms | {source: high}
        if not reason:
            earlier = self.applied.get(source, [])[-(self.settings.window - 1) :]
            self.applied = self.applied | {source: [*earlier, [batch, loss, norm]]}
            return APPLY, ""
        self.skipped.append({"batch": batch, "reason": reason, "loss": plain(loss), "grad_norm": plain(norm)})
        if len(self.skipped) <= self.settings.skips:
            return SKIP, reason
        return (ROLL_BACK if self.rollbacks < self.settings.rollbacks else STOP), reason

    def start_afresh(self) -> None:
        """Forget what losses and norms were: from here on other weights are trained."""
        self.applied, self.high_norms, self.norms_since, self.skipped = {}, {}, {}, []

    def _problem(self, loss: float, norm: float, source: str) -> tuple[str, bool]:
        """What is wrong, or nothing; and whether it is a finite norm alone."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is not finite", False
        applied, since = self.applied.get(source, []), self.norms_since.get(source, -1)
        losses = [one[1] for one in applied]
        norms = [one[2] for one in applied if one[0] >= since]
        if problem := self._spike("loss", loss, losses):
            return problem, False
        problem = self._spike("gradient norm", norm, norms)
        return problem, bool(problem)

    def _spike(self, name: str, value: float, last: list[float]) -> str:
        if self.settings.deviations is None or len(last) < max(2, self.settings.window // 4):
            return ""
        known = np.log(np.maximum(last, SMALLEST))
        middle = np.median(known)
        deviation = max(np.median(np.abs(known - middle)), LEAST_DEVIATION)
        if math.log(max(value, SMALLEST)) <= middle + self.settings.deviations * deviation:
            return ""
        return f"the {name} is {value:.4g}, the median of the last {len(known)} steps {math.exp(middle):.4g}"

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
        applied = sorted(one for source in self.applied.values() for one in source)
        applied = [dict(zip(("batch", "loss", "grad_norm"), one, strict=True)) for one in applied]
        with output_file(path) as file:
            report = {**facts, "not_applied": bad, "passed_over": self.passed_over, "last_applied": applied}
            json.dump(report, file, indent=1, ensure_ascii=False)


def plain(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)
