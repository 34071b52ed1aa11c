"""Symmetric InfoNCE over the vectors of all ranks, tile by tile: the matrix of scores is never held.

For pairs (x_i, y_i), score s_ij = scale * cos(x_i, y_j). Direction x: row x_i against every y and every h; direction y: row
y_j against every x and every g. Both directions read the same tiles of s, this rank's x against all y: the rows of a tile
give log-sums of direction x, its columns partial ones of direction y, which the ranks merge. Backward makes each tile
again. A row's own partner is kept out of the tiles and joins the log-sums at the end, so that a row with no negative has
a loss of exactly 0.

Sources: tiles with merged log-sums, Cheng et al. 2024 (Inf-CL, arXiv 2410.17243); several positives, Khosla et al. 2020
(arXiv 2004.11362, eq. 2); the margin, Zhang et al. 2025 (Qwen3 Embedding, arXiv 2506.05176); widths, Kusupati et al. 2022
(arXiv 2205.13147).

Legend: n pairs of this rank, N pairs of all ranks, W width, K widths (1 without Matryoshka), m hard negatives of this
rank, c columns of this rank (n of y and its hard negatives), C columns of all ranks, Q queries of a direction (n or N),
A columns of a block, I x T rows and columns of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmde_dist.objectives.gather import Ranks

TILE = 2048  # 16 MiB of fp32, of which three or four are alive at a time
NOTHING = float("-inf")


class Contrast(NamedTuple):
    """The loss of this rank's rows, and what is worth watching about it."""

    loss: Tensor  # [] mean over this rank's rows, both directions added
    accuracy: Tensor  # [] share of rows whose own partner scores above every negative, mean of the two directions
    negatives: int  # columns of a row minus its own partner's (the largest number where some are masked)


class Hard(NamedTuple):
    """Further columns of one direction; m is the same on every rank. They are negatives or masked, never positives."""

    vectors: Tensor  # [m, W], any norm
    groups: Tensor  # int64 [m]
    languages: Tensor | None = None  # int64 [m], needed with scope="same"


def tile_loss(
    x: Tensor,
    y: Tensor,
    groups: Tensor,
    scale: Tensor,
    *,
    hard_x: Hard | None = None,
    hard_y: Hard | None = None,
    weights: Tensor | None = None,
    positives: str = "own",
    margin: float | None = None,
    languages: tuple[Tensor, Tensor] | None = None,
    scope: str = "all",
    widths: Sequence[tuple[int, float]] | None = None,
    tile: int = TILE,
    ranks: Ranks | None = None,
) -> Contrast:
    """The contrastive loss of this rank's pairs against the vectors of all ranks.

    Value and gradients follow the convention of `gather.py`: the loss is the mean over this rank's own rows, the engine
    averages gradients over ranks, and the gradients of x, y and the hard negatives are sums over ranks of what each rank's
    loss says of them. The gradient of the scale is a share: only its mean over ranks means something. The gradient that
    comes back to the loss must be the same on every rank.

    Collectives of a call on several ranks: forward two all-gathers (columns [c, W]; ids, weights and cosines, 8 * (4 + K)
    bytes a pair and 16 a hard negative) and two all-reduces (MAX and SUM, each [K, N]; with positives="group" 2 and 3
    times that); backward one reduce-scatter of [C, W]. Memory: the columns and their gradient, [C, W] each; half a dozen of
    [n, W]; three or four tiles, or as much as K + 3 with widths, each of 1/K the columns.

    Args:
        x, y: [n, W] vectors of this rank's pairs, any norm; n >= 1 is the same on every rank. Computed in fp32 at least.
        groups: int64 [n] group of each pair. Pairs of one group, on whatever rank, are no negatives of each other.
        scale: [1] or [] inverse temperature, above 0; trainable.
        hard_x: further columns of the rows x (h); those of a row's group are masked from it.
        hard_y: further columns of the rows y (g), likewise.
        weights: [n] of the rows, 0 or more: loss = sum(w * l) / sum(w) over all ranks (0 where all are 0). No gradient.
        positives: "own": other pairs of the row's group are masked. "group": they are positives, and the loss of a row
            is the mean of -log p over its positives, each of which is in the denominator.
        margin: a negative whose cosine is above that of the row's own pair + margin is masked; the decision has no
            gradient, and each of `widths` takes its own. None: off.
        languages: int64 [n] of x and of y.
        scope: "all", or "same": a row's candidates, further positives among them, are only the columns in the language
            of its own partner (for x_i the language of y_i, for y_j that of x_j).
        widths: (components, weight > 0) of a Matryoshka loss: the weighted sum of the losses on the first components, each
            normalised anew; accuracy is that of the largest. None: the whole width, weight 1.
        tile: largest number of rows and of columns of a tile.
        ranks: stands in for the process group.

    Raises:
        ValueError: shapes or options that do not fit each other.
    """
    widths = sorted(widths if widths is not None else [(x.shape[-1], 1.0)])
    _check(x, y, groups, hard_x, hard_y, weights, positives, languages, scope, widths, tile)
    ranks = ranks or Ranks()
    hard = [side or Hard(x[:0], groups[:0]) for side in (hard_x, hard_y)]
    work = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        largest = widths[-1][0]
        units = [F.normalize(v[:, :largest].to(work), dim=-1) for v in (x, y, hard[0].vectors, hard[1].vectors)]
        scale = scale.to(work).reshape(())
        plan = _Plan(
            tile=tile,
            margin=margin is not None,
            several=positives == "group",
            same_language=scope == "same",
            ranks=ranks,
            widths=tuple(width for width, _ in widths),
            own=slice(ranks.rank * len(x), (ranks.rank + 1) * len(x)),
            **_exchange(ranks, *units[:2], scale, groups, weights, languages, hard, widths, margin or 0.0),
        )
        loss, accuracy = _TileLoss.apply(*units, scale, plan)
    return Contrast(loss, accuracy, ranks.size * (len(x) + max(len(side.groups) for side in hard)) - 1)


def _check(x, y, groups, hard_x, hard_y, weights, positives, languages, scope, widths, tile) -> None:
    if x.ndim != 2 or x.shape != y.shape or not len(x):
        raise ValueError(f"x and y must be [n, W] alike with n >= 1, not {list(x.shape)} and {list(y.shape)}")
    if positives not in ("own", "group") or scope not in ("all", "same"):
        raise ValueError(f'positives "{positives}" is not "own" or "group", or scope "{scope}" is not "all" or "same"')
    hard = [side for side in (hard_x, hard_y) if side is not None]
    if scope == "same" and (languages is None or any(side.languages is None for side in hard)):
        raise ValueError('scope "same" needs the languages of x, of y and of every hard negative')
    for side in hard:
        if side.vectors.ndim != 2 or side.vectors.shape[1] != x.shape[1]:
            raise ValueError(f"hard negatives must be [m, {x.shape[1]}], not {list(side.vectors.shape)}")
    facts = [(fact, x) for fact in (groups, weights, *(languages or ()))]
    facts += [(fact, side.vectors) for side in hard for fact in (side.groups, side.languages)]
    for fact, rows in facts:
        if fact is not None and fact.shape != rows.shape[:1]:
            raise ValueError(
                f"groups, languages, weights must be one a row, not {list(fact.shape)} for {len(rows)} rows"
            )
    numbers = [width for width, _ in widths]
    if not numbers or len(set(numbers)) < len(numbers) or numbers[0] < 1 or numbers[-1] > x.shape[1]:
        raise ValueError(f"widths must be different numbers from 1 to {x.shape[1]}, not {numbers}")
    if tile < 1 or any(weight <= 0 for _, weight in widths):
        raise ValueError("a tile has at least 1 row, and the weight of a width is above 0")


@dataclass(frozen=True)
class _Side:
    """What the masks ask of rows or of columns; the last three only of those that have a partner."""

    groups: Tensor  # [Q]
    languages: Tensor  # [Q], anything where the scope is "all"
    wanted: Tensor | None = None  # [Q] language of the own partner
    scores: Tensor | None = None  # [K, Q] with the own partner
    limits: Tensor | None = None  # [K, Q] above which the margin masks

    def at(self, span: slice) -> "_Side":
        return _Side(*(fact if fact is None else fact[..., span] for fact in vars(self).values()))


@dataclass(frozen=True)
class _Plan:
    """Options of a call, and all that is known of the pairs and columns but their vectors."""

    tile: int
    margin: bool
    several: bool  # more than one positive a row
    same_language: bool
    ranks: Ranks
    widths: tuple[int, ...]
    own: slice  # this rank's pairs among all
    shares: Tensor  # [K, N] of each pair in the loss of its rank
    pairs: tuple[_Side, _Side]  # x and y of all ranks
    hard: tuple[_Side, _Side]  # h and g of all ranks

    @property
    def slabs(self) -> list[slice]:
        return _slabs(self.widths)


def _slabs(widths: Sequence[int]) -> list[slice]:
    """The components that each width adds to the one before."""
    return [slice(start, stop) for start, stop in zip((0, *widths), widths, strict=False)]


@torch.no_grad()
def _exchange(ranks: Ranks, x, y, scale, groups, weights, languages, hard, widths, margin) -> dict:
    """What the ranks must know of each other's pairs, by the names of `_Plan`."""
    numbers = [width for width, _ in widths]
    cosines_Kn = torch.stack([(x[:, slab] * y[:, slab]).sum(1) for slab in _slabs(numbers)]).cumsum(0)
    cosines_Kn *= _inverse_norms(x, numbers) * _inverse_norms(y, numbers)
    weights = torch.ones_like(cosines_Kn[0]) if weights is None else weights.to(x.dtype)
    # Where nobody reads languages, groups take their place.
    facts = [weights, cosines_Kn, groups, *(languages or (groups, groups))]
    facts += [
        fact for side in hard for fact in (side.groups, side.groups if side.languages is None else side.languages)
    ]
    weights_N, cosines_KN, groups_N, x_languages_N, y_languages_N, *hard_facts = _gather_facts(ranks, facts)
    weights_K = torch.tensor([weight for _, weight in widths], dtype=x.dtype, device=x.device)
    shares_N = ranks.size * weights_N / weights_N.sum().clamp_min(torch.finfo(x.dtype).tiny)
    partner = scale * cosines_KN, scale * (cosines_KN + margin)
    return {
        "shares": weights_K[:, None] * shares_N,
        "pairs": (
            _Side(groups_N, x_languages_N, y_languages_N, *partner),
            _Side(groups_N, y_languages_N, x_languages_N, *partner),
        ),
        "hard": (_Side(*hard_facts[:2]), _Side(*hard_facts[2:])),
    }


def _gather_facts(ranks: Ranks, facts: list[Tensor]) -> list[Tensor]:
    """[..., q] of every rank -> [..., size * q], all in one collective: as int64, fractions as the bits of their fp64."""
    flat = [f.double().view(torch.int64) if f.is_floating_point() else f.long() for f in facts]
    gathered = ranks.all_gather(torch.cat([f.flatten() for f in flat])).view(ranks.size, -1)
    wholes = []
    for fact, part in zip(facts, gathered.split([f.numel() for f in facts], dim=1), strict=True):
        part = part.contiguous().view(torch.float64).to(fact.dtype) if fact.is_floating_point() else part
        wholes.append(part.reshape(ranks.size, *fact.shape).movedim(0, -2).flatten(-2))
    return wholes


def _inverse_norms(units: Tensor, widths: Sequence[int]) -> Tensor:
    """[K, rows] of the first components of unit vectors; 1 for the last width, which is all of them."""
    inverse = [torch.linalg.vector_norm(units[:, :w], dim=1).clamp_min(1e-12).reciprocal() for w in widths[:-1]]
    return torch.stack([*inverse, torch.ones_like(units[:, 0])])


class _Columns(NamedTuple):
    """The columns of a tile."""

    span: slice  # among the columns of the block
    places: Tensor  # [T] among all that were gathered
    units: Tensor  # [T, W]
    scaled: Tensor  # [T, W] units times scale
    inverse_norms: Tensor  # [K, T]


class _Kept(NamedTuple):
    """A tile as one direction sees it."""

    dim: int  # of the candidates: 1 where the rows are the queries, 0 where the columns are
    scores: Tensor  # [I, T], -inf where a candidate does not count, and for the own partner
    further: Tensor | None  # [I, T] positives besides the own partner


@dataclass(frozen=True)
class _Block:
    """Rows of this rank against columns of all ranks."""

    plan: _Plan
    rows: Tensor  # [n, W]
    inverse_norms: Tensor  # [K, n]
    row_side: _Side  # [n]
    column_side: _Side  # [A]
    places: Tensor  # [A] of the columns among all that were gathered
    mutual: bool  # the columns are the partners y: queries, too

    def row_spans(self) -> list[slice]:
        return _spans(len(self.rows), self.plan.tile)

    def columns(self, all_CW: Tensor, scale: Tensor) -> Iterator[_Columns]:
        for span in _spans(len(self.places), max(1, self.plan.tile // len(self.plan.widths))):
            units_TW = all_CW[self.places[span]]
            norms = _inverse_norms(units_TW, self.plan.widths)
            yield _Columns(span, self.places[span], units_TW, units_TW * scale, norms)

    def tiles(self, rows: slice, columns: _Columns) -> Iterator[tuple[Tensor, list[_Kept]]]:
        """For each width, the products [I, T] times scale, and the scores as each direction sees them."""
        plan, row_side, column_side = self.plan, self.row_side.at(rows), self.column_side.at(columns.span)
        masked = row_side.groups[:, None] == column_side.groups
        further = None
        if plan.several and self.mutual:
            numbers = torch.arange(len(self.places), device=masked.device)
            own = numbers[plan.own][rows, None] == numbers[columns.span]
            masked, further = own, masked & ~own
        products = None
        for k, slab in enumerate(plan.slabs):
            if products is None:
                products = self.rows[rows, slab] @ columns.scaled[:, slab].T
            else:
                products.addmm_(self.rows[rows, slab], columns.scaled[:, slab].T)
            scores = products  # of the last width nobody reads the products any more
            if k < len(plan.widths) - 1:
                scores = (products * self.inverse_norms[k, rows, None]).mul_(columns.inverse_norms[k])
            scores.masked_fill_(masked, NOTHING)
            kept = [self._kept(k, scores, further, row_side, column_side, 1)]
            if self.mutual:
                kept.append(self._kept(k, scores, further, column_side, row_side, 0))
            yield products, kept

    def _kept(self, k: int, scores: Tensor, further: Tensor | None, queries: _Side, candidates: _Side, dim: int):
        if self.plan.margin:
            above = scores > queries.limits[k].unsqueeze(dim)
            scores = scores.masked_fill(above if further is None else above & ~further, NOTHING)
        if self.plan.same_language:
            foreign = candidates.languages.unsqueeze(1 - dim) != queries.wanted.unsqueeze(dim)
            scores = scores.masked_fill(foreign, NOTHING)
            further = None if further is None else further & ~foreign
        return _Kept(dim, scores, further)


def _spans(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _blocks(plan: _Plan, x: Tensor, y: Tensor) -> list[_Block]:
    """x against y, x against h, y against g."""
    counts = [len(side.groups) // plan.ranks.size for side in (plan.pairs[1], *plan.hard)]
    first_of_rank = torch.arange(plan.ranks.size, device=x.device)[:, None] * sum(counts)
    of_rank = torch.arange(sum(counts), device=x.device).split(counts)
    of_x, of_y = (
        (units, _inverse_norms(units, plan.widths), side.at(plan.own))
        for units, side in zip((x, y), plan.pairs, strict=True)
    )
    sides = (plan.pairs[1], *plan.hard)
    return [
        _Block(plan, *rows, side, (first_of_rank + places).flatten(), mutual)
        for rows, side, places, mutual in zip((of_x, of_x, of_y), sides, of_rank, (True, False, False), strict=True)
    ]


class _Slopes(NamedTuple):
    """Derivatives of the loss by the scores of Q queries, among them `own` by that of the own partner."""

    offsets: Tensor  # [K, Q] log-sum over the candidates minus log of the query's share
    rates: Tensor  # [K, Q] what a further positive takes off
    own: Tensor  # [K, Q]

    def at(self, span: slice) -> "_Slopes":
        return _Slopes(*(part[:, span] for part in self))

    def of(self, k: int, tile: _Kept) -> Tensor:
        """[I, T]"""
        slopes = (tile.scores - self.offsets[k].unsqueeze(tile.dim)).exp_()
        if tile.further is not None:
            slopes.sub_(tile.further * self.rates[k].unsqueeze(tile.dim))
        return slopes


class _Ledger(NamedTuple):
    """The candidates of Q queries so far, without the own partner."""

    maxima: Tensor  # [1, K, Q]: of the scores; [2, K, Q] with several positives: and of the negatives' alone
    sums: Tensor  # [1, K, Q]: of exp(score - maximum); [3, K, Q]: and of the further positives' scores, and of their number

    @classmethod
    def empty(cls, plan: _Plan, queries: int, like: Tensor) -> "_Ledger":
        # The lowest number, not -inf: a query without candidates must not make inf - inf.
        maxima = like.new_full((2 if plan.several else 1, len(plan.widths), queries), torch.finfo(like.dtype).min)
        return cls(maxima, like.new_zeros(3 if plan.several else 1, len(plan.widths), queries))

    def at(self, span: slice) -> "_Ledger":
        return _Ledger(self.maxima[..., span], self.sums[..., span])

    def add(self, k: int, tile: _Kept) -> None:
        maxima, sums, dim = self.maxima[:, k], self.sums[:, k], tile.dim
        maximum = torch.maximum(maxima[0], tile.scores.amax(dim))
        sums[0].mul_((maxima[0] - maximum).exp_()).add_((tile.scores - maximum.unsqueeze(dim)).exp_().sum(dim))
        maxima[0] = maximum
        if len(maxima) > 1:
            negatives = tile.scores if tile.further is None else tile.scores.masked_fill(tile.further, NOTHING)
            maxima[1] = torch.maximum(maxima[1], negatives.amax(dim))
        if tile.further is not None:
            sums[1] += tile.scores.masked_fill(~tile.further, 0).sum(dim)
            sums[2] += tile.further.sum(dim)

    def merge(self, ranks: Ranks) -> None:
        """With what the other ranks know of the same queries."""
        before = self.maxima[0].clone()
        ranks.maximum(self.maxima)
        self.sums[0].mul_((before - self.maxima[0]).exp_())
        ranks.total(self.sums)

    def hits(self, own: Tensor) -> Tensor:
        """[K, Q] whether the score with the own partner is above that of every negative."""
        return own > self.maxima[-1]

    def losses(self, own: Tensor) -> Tensor:
        """[K, Q], from the scores with the own partners."""
        losses = self._excess(own)
        if len(self.sums) > 1:
            losses += own - (own + self.sums[1]) / (1 + self.sums[2])
        return losses

    def slopes(self, own: Tensor, shares: Tensor) -> _Slopes:
        """From the scores with the own partners and the queries' shares in the loss, [K, Q] each."""
        excess = self._excess(own)
        rates = 1 / (1 + self.sums[2]) if len(self.sums) > 1 else torch.ones_like(own)
        # expm1: probability of the own partner minus 1, exact also where it is nearly 1.
        by_own = torch.expm1(-excess) + (1 - rates)
        return _Slopes(own + excess - shares.log(), shares * rates, shares * by_own)

    def _excess(self, own: Tensor) -> Tensor:
        """The log-sum over all candidates minus the score of the own partner."""
        others = self.sums[0].log() + self.maxima[0]
        return torch.logaddexp(others - own, torch.zeros_like(own))


class _TileLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, h: Tensor, g: Tensor, scale: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        all_CW = plan.ranks.all_gather(torch.cat([y, h, g]) if len(h) + len(g) else y)
        from_x, from_y = (_Ledger.empty(plan, queries, x) for queries in (len(x), plan.shares.shape[1]))
        ledgers = (from_x, from_x, from_y.at(plan.own))
        for block, ledger in zip(_blocks(plan, x, y), ledgers, strict=True):
            for columns in block.columns(all_CW, scale):
                for rows in block.row_spans():
                    for k, (_, kept) in enumerate(block.tiles(rows, columns)):
                        ledger.at(rows).add(k, kept[0])
                        if block.mutual:
                            from_y.at(columns.span).add(k, kept[1])
        from_y.merge(plan.ranks)
        scores_KN, own = plan.pairs[1].scores, plan.own
        own_Kn, shares_Kn, own_from_y = scores_KN[:, own], plan.shares[:, own], from_y.at(own)
        loss = (shares_Kn * (from_x.losses(own_Kn) + own_from_y.losses(own_Kn))).sum()
        hits_2n = torch.stack([from_x.hits(own_Kn)[-1], own_from_y.hits(own_Kn)[-1]])
        accuracy = hits_2n.to(x.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        ctx.plan = plan
        ctx.slopes = from_x.slopes(own_Kn, shares_Kn), from_y.slopes(scores_KN, plan.shares)
        ctx.save_for_backward(x, y, h, scale, all_CW)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _: Tensor | None):
        with torch.autocast(upstream.device.type, enabled=False):
            gradients = _gradients(ctx.plan, *ctx.slopes, *ctx.saved_tensors)
        return *(gradient.mul_(upstream) for gradient in gradients), None


def _gradients(
    plan: _Plan, from_x: _Slopes, from_y: _Slopes, x: Tensor, y: Tensor, h: Tensor, scale: Tensor, all_CW: Tensor
) -> tuple[Tensor, ...]:
    """By x, y, h, g and scale, in this order."""
    own_from_y = from_y.at(plan.own)
    d_all_CW, d_x, d_y = torch.zeros_like(all_CW), torch.zeros_like(x), torch.zeros_like(y)
    # Along a prefix a vector has no effect on its cosines; of the last width F.normalize takes care.
    along_x, along_y = (x.new_zeros(len(plan.widths), len(x)) for _ in range(2))
    ways = ((from_x, d_x, along_x), (from_x, d_x, along_x), (own_from_y, d_y, along_y))
    for block, (slopes, d_rows, along_rows) in zip(_blocks(plan, x, y), ways, strict=True):
        for columns in block.columns(all_CW, scale):
            d_columns = torch.zeros_like(columns.units)
            along_columns = torch.zeros_like(columns.inverse_norms)
            for rows in block.row_spans():
                by_width = []
                for k, (products, kept) in enumerate(block.tiles(rows, columns)):
                    slope = slopes.at(rows).of(k, kept[0])
                    if block.mutual:
                        slope += from_y.at(columns.span).of(k, kept[1])
                    if k < len(plan.widths) - 1:
                        slope.mul_(block.inverse_norms[k, rows, None]).mul_(columns.inverse_norms[k])
                        along = slope * products
                        along_rows[k, rows] += along.sum(1)
                        along_columns[k] += along.sum(0)
                    by_width.append(slope)
                total = None
                for slab, slope in zip(reversed(plan.slabs), reversed(by_width), strict=True):
                    total = slope if total is None else total.add_(slope)
                    d_rows[rows, slab].addmm_(total, columns.units[:, slab])
                    d_columns[:, slab].addmm_(total.T, block.rows[rows, slab])
            _drop_along(d_columns.mul_(scale), columns.units, along_columns, plan.widths, columns.inverse_norms)
            d_all_CW.index_add_(0, columns.places, d_columns)
    # The own pairs: once for the scale, which reads d_x and the hard negatives' part of d_y, once for y.
    inverse_x, inverse_y = _inverse_norms(x, plan.widths), _inverse_norms(y, plan.widths)
    own_Kn = from_x.own + own_from_y.own
    totals_Kn = (own_Kn * inverse_x * inverse_y).flip(0).cumsum(0).flip(0)
    for slab, total_n in zip(plan.slabs, totals_Kn, strict=True):
        d_x[:, slab].addcmul_(total_n[:, None], y[:, slab])
    d_scale = (d_x * x).sum() + (d_y * y).sum()
    for slab, total_n in zip(plan.slabs, totals_Kn, strict=True):
        d_y[:, slab].addcmul_(total_n[:, None], x[:, slab])
    along_own = own_Kn * plan.pairs[1].scores[:, plan.own]
    _drop_along(d_x.mul_(scale), x, along_x + along_own, plan.widths, inverse_x)
    _drop_along(d_y.mul_(scale), y, along_y + along_own, plan.widths, inverse_y)
    d_own_cW = plan.ranks.reduce_scatter(d_all_CW)
    d_y += d_own_cW[: len(y)]
    d_h, d_g = d_own_cW[len(y) :].tensor_split([len(h)])
    return d_x, d_y, d_h, d_g, d_scale


def _drop_along(d_units: Tensor, units: Tensor, along: Tensor, widths: Sequence[int], inverse_norms: Tensor) -> None:
    """Take off the part of the gradient along each prefix but the last."""
    for k, width in enumerate(widths[:-1]):
        parts = along[k] * inverse_norms[k].square()
        d_units[:, :width].addcmul_(parts[:, None], units[:, :width], value=-1)
