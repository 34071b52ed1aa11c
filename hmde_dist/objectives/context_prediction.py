"""Contrastive context prediction (CCP, Wu et al. 2022, arXiv 2206.03281): a sentence finds one from its neighbourhood.

Of every document a sentence c is drawn, and a sentence s at most `window` sentences away. With z = unit(Linear(norm(Linear(vector)))):
    loss = mean of 1/2 [ -log e^{z_c.z_s/t} / sum_n e^{z_c.z_n/t}  +  the same with c and s exchanged ]
where n runs over s, the sentences s of other documents of the same language in the batch, and the memory bank of that language:
sentences of the last batches. Negatives of one language only, or the vectors would collapse to telling languages apart; a batch
has few of each, hence the bank. Other versions of a document, and itself in the bank, never count. Needs no links between
languages, only the order of sentences.

The norm is a layer norm, or CCP's asymmetric batch norm: one side is normalised by the statistics of the (whole, global) batch, the
other by their running mean, in turns; with the batch's own on both, they would give the pairing away. The head is not part of
the model; vectors are calibrated afterwards, see tools/postprocess.py.

The bank is state: the same on all ranks, for the rows of a step enter it sorted by document, and part of checkpoints.

Legend: n documents of this rank, N of all ranks, Q places in the bank of a language, L languages.
"""

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hmde_dist.model.modeling_hmde import HMDEModel, HMDEOutput
from hmde_dist.objectives import objective
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Rows, gather_ragged, total_count
from hmde_dist.recipe import Count, ObjectiveSection
from hmde_dist.stream import draws
from hmde_dist.stream.batch import PackedBatch

MOMENTUM = 0.1  # of the running statistics, as torch's batch norm has it


class Settings(ObjectiveSection):
    window: Count = Field(2, description="sentences on either side that count as context")
    temperature: Annotated[float, Field(gt=0)] = 0.1
    bank: Annotated[int, Field(ge=0)] = Field(4096, description="vectors of each language that are kept as negatives")
    norm: Literal["layer", "batch"] = Field(
        "layer", description="inside the head; batch = CCP's asymmetric batch norm, over the global batch"
    )


class Objective(objective.Objective):
    def __init__(self, settings: Settings, encoder: HMDEModel):
        super().__init__(settings, encoder)
        width, languages = encoder.config.hidden_size, len(encoder.config.languages)
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        if settings.bank:
            self.register_buffer("bank", torch.zeros(languages, settings.bank, width))
            self.register_buffer("bank_groups", torch.full((languages, settings.bank), -1))  # -1 = empty
            self.register_buffer("bank_next", torch.zeros(languages, dtype=torch.int64))
        if settings.norm == "batch":
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.ones(width))
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def constants(self) -> Rows:
        # The head runs in the loss, for the statistics of a batch norm cross chunks and ranks.
        # ZeRO-3 brings a parameter when it is asked for by name, and takes it away behind this pass: hence copies.
        return {name.replace(".", "_"): self.get_parameter(name).clone() for name, _ in self.named_parameters()}

    def rows(self, encoder: HMDEModel, batch: PackedBatch, output: HMDEOutput) -> Rows:
        facts, counts = batch.facts, np.array(batch.sentence_counts)
        documents, centres, contexts = drawn_contexts(counts, facts, self.settings.window)
        first = (np.cumsum(counts) - counts)[documents]
        device = output.sentences.device
        numbers = {"groups": facts.groups[documents], "languages": facts.languages[documents]}
        return {
            "centres": output.sentences[torch.from_numpy(first + centres).to(device)],
            "contexts": output.sentences[torch.from_numpy(first + contexts).to(device)],
        } | {name: torch.from_numpy(fact.astype(np.int64)).to(device) for name, fact in numbers.items()}

    def loss(self, rows: Rows, constants: Rows, ranks: Ranks) -> Loss:
        everyone = total_count(len(rows["groups"]), ranks, rows["groups"].device)
        count = max(1.0, everyone) / ranks.size
        centres, contexts, statistics = self.project(
            rows["centres"], rows["contexts"], constants, count * ranks.size, ranks
        )
        # A padded row has group and language -1, which is nobody's.
        groups, languages = (gather_ragged(rows[name], ranks, -1) for name in ("groups", "languages"))
        candidates = [gather_ragged(side, ranks, 0.0) for side in (contexts, centres)]
        bank = (self.bank, self.bank_groups) if self.settings.bank else None
        total, right, negatives = centres.new_zeros(()), centres.new_zeros(()), 0
        for anchors, partners, others in zip((centres, contexts), (contexts, centres), candidates, strict=True):
            scores, count_each = context_scores(
                anchors, others, (rows["groups"], rows["languages"]), (groups, languages), bank
            )
            scores, own = scores / self.settings.temperature, (anchors * partners).sum(1) / self.settings.temperature
            losses = torch.cat([own[:, None], scores], 1).logsumexp(1) - own
            total = total + losses.sum() / 2
            right = right + (scores.detach() < own[:, None]).all(1).sum() / 2
            negatives = max(negatives, count_each)
        watched = {"bank_filled": (self.bank_groups >= 0).float().mean()} if bank else {}

        def commit() -> None:
            if statistics and everyone:  # of nothing there are none
                self.mean += MOMENTUM * (statistics[0] - self.mean)
                self.variance += MOMENTUM * (statistics[1] - self.variance)
                self.steps += 1
            if bank:
                self.push(candidates[0].detach(), groups, languages)

        return Loss(total / count, (right / count).detach(), negatives, watched, commit)

    def project(self, centres: Tensor, contexts: Tensor, constants: Rows, number: float, ranks: Ranks) -> tuple:
        """Unit vectors [n, W] of both sides, and this batch's statistics or none. A collective with batch norm.

        Args:
            number: N, the rows of all ranks.
        """
        sides = [F.linear(side, constants["into_weight"], constants["into_bias"]) for side in (centres, contexts)]
        statistics = None
        if self.settings.norm == "layer":
            normal = [F.layer_norm(side, side.shape[1:]) for side in sides]
        else:
            fresh = int(self.steps) % 2  # the side whose own statistics count
            mean = whole_sum(sides[fresh].sum(0), ranks) / number
            variance = whole_sum((sides[fresh] - mean).square().sum(0), ranks) / number
            used = [(self.mean, self.variance)] * 2
            used[fresh] = (mean, variance)
            normal = [(side - m) / (v + 1e-5).sqrt() for side, (m, v) in zip(sides, used, strict=True)]
            statistics = mean.detach(), variance.detach()
        sides = [side * constants["gain"] + constants["shift"] for side in normal]
        units = [F.normalize(F.linear(side, constants["out_weight"], constants["out_bias"]), dim=-1) for side in sides]
        return *units, statistics

    def push(self, vectors: Tensor, groups: Tensor, languages: Tensor) -> None:
        """These rows [N] enter the bank of their language; the oldest leave it."""
        # In an order that depends on documents alone, not on the ranks that have them.
        order = torch.argsort(groups, stable=True)
        for language in range(len(self.bank)):
            new = order[languages[order] == language][-self.settings.bank :]
            places = (self.bank_next[language] + torch.arange(len(new), device=new.device)) % self.settings.bank
            self.bank[language, places], self.bank_groups[language, places] = vectors[new], groups[new]
            self.bank_next[language] = (self.bank_next[language] + len(new)) % self.settings.bank


def whole_sum(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of a tensor, with its gradient. A collective."""
    return gather_ragged(part[None], ranks, 0.0).sum(0)


def drawn_contexts(counts: np.ndarray, facts, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, place of c, place of s) [n] of every document that has two sentences."""
    documents = np.flatnonzero(counts > 1)
    key = (facts.step, facts.groups[documents], facts.languages[documents])
    many = counts[documents]
    centres = (draws.uniform(0, "centre", *key) * many).astype(np.int64)
    low, high = np.maximum(centres - window, 0), np.minimum(centres + window, many - 1)
    contexts = low + (draws.uniform(0, "context", *key) * (high - low)).astype(np.int64)
    return documents, centres, contexts + (contexts >= centres)  # c itself is passed over


def context_scores(
    anchors: Tensor,
    others: Tensor,
    anchor_facts: tuple[Tensor, Tensor],
    other_facts: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, int]:
    """Cosines [n, N + Q] of anchors with everything that may be a negative, -inf where it is none; the most of an anchor.

    Args:
        anchors: [n, W] unit vectors; others: [N, W], those of the partners' side on all ranks.
        anchor_facts, other_facts: groups and languages, [n] and [N].
        bank: vectors [L, Q, W] and groups [L, Q], -1 = empty.
    """
    (groups, languages), (other_groups, other_languages) = anchor_facts, other_facts
    allowed = (languages[:, None] == other_languages) & (groups[:, None] != other_groups)
    scores = [(anchors @ others.T).masked_fill(~allowed, float("-inf"))]
    counts = allowed.sum(1)
    if bank:
        # Language by language: an anchor meets the bank of its own only.
        vectors, bank_groups = bank
        kept = anchors.new_full((len(anchors), vectors.shape[1]), float("-inf"))
        for language in languages.unique().tolist():
            rows = torch.nonzero(languages == language)[:, 0]
            usable = (bank_groups[language] >= 0) & (bank_groups[language] != groups[rows, None])
            found = (anchors[rows] @ vectors[language].T).masked_fill(~usable, float("-inf"))
            kept, counts = kept.index_copy(0, rows, found), counts.index_add(0, rows, usable.sum(1))
        scores.append(kept)
    return torch.cat(scores, 1), int(counts.max()) if len(counts) else 0
