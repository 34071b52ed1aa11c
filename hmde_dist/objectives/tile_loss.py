"""Symmetric InfoNCE over the vectors of all ranks, tile by tile: the matrix of scores is never held.

For pairs (x_i, y_i), score s_ij = scale * cos(x_i, y_j). Direction x: row x_i against every y and every h; direction y: row
y_j against every x and every g. Both directions read the same tiles of s: a rank's own x against all y. The rows of a
tile give log-sums of direction x, its columns partial ones of direction y, which the ranks merge. Backward makes each tile
again. A row's own partner is kept out of the tiles and added to the log-sums at the end, so a row with no negative has
a loss of exactly 0.

Sources: tiles and merged log-sums, Cheng et al. 2024 (Inf-CL, arXiv 2410.17243); several positives, Khosla et al. 2020
(arXiv 2004.11362, eq. 2); the margin, Zhang et al. 2025 (Qwen3 Embedding, arXiv 2506.05176); widths, Kusupati et al. 2022
(arXiv 2205.13147).

Legend: n pairs of this rank, N pairs of all ranks, W width, K widths (1 without Matryoshka), m hard negatives of this
rank, c columns of this rank (n of y and its hard negatives), C columns of all ranks, Q queries of a direction (n or N),
A columns a block of tiles reads, I x T rows and columns of one tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # rows and columns of a tile: 16 MiB of fp32, of which three or four are alive at a time
_NOTHING = float("-inf")


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


class Ranks:
    """The collectives of the loss among the default process group; without one, or alone in it, there are none."""

    def __init__(self):
        joined = dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def all_gather(self, local: Tensor) -> Tensor:
        """Rows of all ranks, in the order of the ranks: [c, ...] -> [size * c, ...]."""
        if self.size == 1:
            return local
        gathered = local.new_empty(self.size * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    def maximum(self, tensor: Tensor) -> None:
        """In place, the largest of the ranks' values."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def total(self, tensor: Tensor) -> None:
        """In place, the sum of the ranks' values."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks: [size * c, ...] -> [c, ...]."""
        if self.size == 1:
            return tensor
        own = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        dist.reduce_scatter_tensor(own, tensor)
        return own


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
    bytes a pair and 16 a hard negative) and two all-reduces (MAX, SUM of [K, N]; with positives="group" [2, K, N] and
    [3, K, N]); backward one reduce-scatter of [C, W]. Memory: n * W, C * W twice (columns, their gradient), three or four
    tiles, and with K widths K more, of which each is 1/K as large.

    Args:
        x, y: [n, W] vectors of this rank's pairs, any norm; n >= 1 is the same on every rank. Computed in fp32 at least.
        groups: int64 [n] group of each pair. Pairs of one group, on whatever rank, are no negatives of each other.
        scale: [1] or [] inverse temperature, above 0; trainable.
        hard_x: further columns of the rows x (h); those of the row's group are masked.
        hard_y: further columns of the rows y (g), likewise.
        weights: [n] of the rows, not negative: loss = sum(w * l) / sum(w), over all ranks. No gradient. Where all
            are 0 so is the loss.
        positives: "own": other pairs of the row's group are masked. "group": they are positives, and the loss of a row
            is the mean of -log p over its positives, each of which is in the denominator.
        margin: a negative whose cosine is above that of the row's own pair + margin is masked; the decision has no
            gradient, and each of `widths` takes its own. None: off.
        languages: int64 [n] of x and of y.
        scope: "all", or "same": a row's candidates, further positives among them, are only the columns in the language
            of its own partner (for x_i the language of y_i, for y_j that of x_j).
        widths: (components, weight > 0) of a Matryoshka loss: the weighted sum of the losses on the first components, each
            normalised anew. None: the whole width, weight 1.
        tile: largest number of rows and of columns of a tile.
        ranks: stands in for the process group.

    Raises:
        ValueError: shapes or options that do not fit each other.
    """
    _check(x, y, groups, hard_x, hard_y, weights, positives, languages, scope, widths, tile)
    ranks = ranks or Ranks()
    pairs, work = len(x), torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    widths = sorted(widths or [(x.shape[1], 1.0)])
    with torch.autocast(x.device.type, enabled=False):
        none = Hard(x.new_empty(0, x.shape[1]), groups[:0], groups[:0])
        sides = [x, y, (hard_x or none).vectors, (hard_y or none).vectors]
        units = [F.normalize(side[:, : widths[-1][0]].to(work), dim=-1) for side in sides]
        scale = scale.to(work).reshape(())
        with torch.no_grad():
            plan = _Plan(
                ranks=ranks,
                tile=tile,
                widths=tuple(width for width, _ in widths),
                weights=torch.tensor([weight for _, weight in widths], dtype=work, device=x.device),
                margin=margin,
                several=positives == "group",
                same_language=scope == "same",
                pairs=pairs,
            )
            plan = _exchange(plan, units, groups, weights, languages, hard_x or none, hard_y or none, scale)
        loss, accuracy = _TileLoss.apply(*units, scale, plan)
    return Contrast(loss, accuracy, ranks.size * (pairs + max(len(sides[2]), len(sides[3]))) - 1)


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
    facts = [(groups, x), (weights, x), *((side.groups, side.vectors) for side in hard)]
    facts += [(language, x) for language in languages or ()] + [(side.languages, side.vectors) for side in hard]
    for fact, rows in facts:
        if fact is not None and fact.shape != rows.shape[:1]:
            raise ValueError(f"groups, languages and weights are one a row: {list(fact.shape)} for {len(rows)} rows")
    numbers = [width for width, _ in widths] if widths is not None else [x.shape[1]]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 1 or max(numbers) > x.shape[1]:
        raise ValueError(f"widths must be different numbers of 1 to {x.shape[1]}, not {numbers}")
    if tile < 1:
        raise ValueError(f"a tile of {tile} holds nothing")


@dataclass(frozen=True)
class _Side:
    """What the masks ask of rows or of columns; the last two only of those that have a partner."""

    groups: Tensor  # [Q]
    languages: Tensor  # [Q]
    wanted: Tensor | None = None  # [Q] language of the own partner
    scores: Tensor | None = None  # [K, Q] with the own partner

    def at(self, span: slice) -> "_Side":
        return _Side(
            self.groups[span],
            self.languages[span],
            None if self.wanted is None else self.wanted[span],
            None if self.scores is None else self.scores[:, span],
        )


@dataclass(frozen=True)
class _Plan:
    """Options of a call, and all that is known of the pairs and columns but their vectors."""

    ranks: Ranks
    tile: int
    widths: tuple[int, ...]
    weights: Tensor  # [K]
    margin: float | None
    several: bool  # more than one positive a row
    same_language: bool
    pairs: int  # n
    slack: Tensor | None = None  # [] the margin as a score
    shares: Tensor | None = None  # [N] share of each pair in the loss of its rank
    x: _Side | None = None  # [n]
    y: _Side | None = None  # [N]
    h: _Side | None = None  # of all ranks
    g: _Side | None = None

    @property
    def own(self) -> slice:
        """This rank's pairs among all."""
        return slice(self.ranks.rank * self.pairs, (self.ranks.rank + 1) * self.pairs)

    @property
    def slabs(self) -> list[slice]:
        """The components that each width adds to the one before."""
        return [slice(start, stop) for start, stop in zip((0, *self.widths), self.widths, strict=False)]


def _exchange(plan, units, groups, weights, languages, hard_x: Hard, hard_y: Hard, scale) -> _Plan:
    """Complete the plan with what is known of the pairs and columns of all ranks: one all-gather."""
    x, y = units[:2]
    cosines_Kn = torch.stack([(x[:, slab] * y[:, slab]).sum(1) for slab in plan.slabs]).cumsum(0)
    cosines_Kn *= _inverse_norms(x, plan.widths) * _inverse_norms(y, plan.widths)
    weights = torch.ones_like(cosines_Kn[0]) if weights is None else weights
    x_languages, y_languages = languages or (groups, groups)
    # Without a scope languages are read by nobody; groups fill their place.
    sent = [groups, x_languages, y_languages, weights, cosines_Kn]
    sent += [fact for hard in (hard_x, hard_y) for fact in (hard.groups, hard.languages)]
    sent = [fact if fact is not None else hard_x.groups[:0] for fact in sent]
    # One tensor for all: fp64 travels as the int64 of the same bits.
    flat = [f.flatten().double().view(torch.int64) if f.is_floating_point() else f.flatten().long() for f in sent]
    sizes = [len(part) for part in flat]
    parts = plan.ranks.all_gather(torch.cat(flat)).view(plan.ranks.size, -1).split(sizes, dim=1)
    groups_N, x_languages_N, y_languages_N, weights_N, cosines, *hard = (part.reshape(-1) for part in parts)
    weights_N = weights_N.view(torch.float64)
    cosines = cosines.view(torch.float64).view(plan.ranks.size, len(plan.widths), plan.pairs)
    scores_KN = scale * cosines.transpose(0, 1).flatten(1).to(scale.dtype)
    shares_N = plan.ranks.size * weights_N / weights_N.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return replace(
        plan,
        slack=None if plan.margin is None else scale * plan.margin,
        shares=shares_N.to(scale.dtype),
        x=_Side(groups_N, x_languages_N, y_languages_N, scores_KN).at(plan.own),
        y=_Side(groups_N, y_languages_N, x_languages_N, scores_KN),
        h=_Side(*hard[:2]),
        g=_Side(*hard[2:]),
    )


def _inverse_norms(vectors: Tensor, widths: tuple[int, ...]) -> Tensor:
    """[K, Q] of the first components of unit vectors: 1 for the last width, which is all of them."""
    inverse = [torch.linalg.vector_norm(vectors[:, :w], dim=1).clamp_min(1e-12).reciprocal() for w in widths[:-1]]
    return torch.stack([*inverse, torch.ones_like(vectors[:, 0])])


@dataclass(frozen=True)
class _Block:
    """Rows of this rank against columns of all ranks, in tiles."""

    rows: Tensor  # [n, W] times scale
    row_side: _Side
    column_side: _Side  # [A]
    places: Tensor  # [A] of the columns among all that were gathered
    mutual: bool  # the columns are the partners y: they are queries too

    def spans(self, plan: _Plan) -> tuple[list[slice], list[slice]]:
        """Rows and columns of the tiles; K widths share the memory of one tile."""
        return _spans(len(self.rows), plan.tile), _spans(len(self.places), max(1, plan.tile // len(plan.widths)))


def _spans(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _blocks(plan: _Plan, x: Tensor, y: Tensor, scale: Tensor) -> list[_Block]:
    """x against y, x against h, y against g."""
    hard_x, hard_y = (len(side.groups) // plan.ranks.size for side in (plan.h, plan.g))
    starts = torch.arange(plan.ranks.size, device=x.device)[:, None] * (plan.pairs + hard_x + hard_y)
    y_places, h_places, g_places = (
        (starts + torch.arange(first, first + count, device=x.device)).flatten()
        for first, count in ((0, plan.pairs), (plan.pairs, hard_x), (plan.pairs + hard_x, hard_y))
    )
    rows = x * scale
    blocks = [_Block(rows, plan.x, plan.y, y_places, True), _Block(rows, plan.x, plan.h, h_places, False)]
    return [*blocks, _Block(y * scale if hard_y else y, plan.y.at(plan.own), plan.g, g_places, False)]


class _Kept(NamedTuple):
    """A tile as one direction sees it."""

    dim: int  # of the candidates: 1 where the rows are the queries, 0 where the columns are
    scores: Tensor  # [I, T], -inf where a candidate does not count, and for the own partner
    further: Tensor | None  # [I, T] positives besides the own partner


def _tile(
    plan: _Plan, block: _Block, rows: slice, columns: slice, columns_TW: Tensor, row_norms: Tensor, column_norms: Tensor
) -> Iterator[tuple[Tensor, list[_Kept]]]:
    """For each width the scaled products [I, T], and what the directions make of them."""
    row_side, column_side = block.row_side.at(rows), block.column_side.at(columns)
    masked = row_side.groups[:, None] == column_side.groups
    further = None
    if plan.several and block.mutual:
        numbers = torch.arange(len(block.places), device=masked.device)
        own = numbers[plan.own][rows, None] == numbers[columns]
        masked, further = own, masked & ~own
    products = None
    for k, slab in enumerate(plan.slabs):
        if products is None:
            products = block.rows[rows, slab] @ columns_TW[:, slab].T
        else:
            products.addmm_(block.rows[rows, slab], columns_TW[:, slab].T)
        last = k == len(plan.widths) - 1
        scores = products if last else (products * row_norms[k, rows, None]).mul_(column_norms[k])
        scores.masked_fill_(masked, _NOTHING)  # of the last width nobody reads the products any more
        kept = [_candidates(plan, k, scores, further, row_side, column_side, 1)]
        if block.mutual:
            kept.append(_candidates(plan, k, scores, further, column_side, row_side, 0))
        yield products, kept


def _candidates(plan, k, scores, further, queries: _Side, candidates: _Side, dim: int) -> _Kept:
    """The tile with what margin and scope leave of it."""
    if plan.margin is not None:
        above = scores > (queries.scores[k] + plan.slack).unsqueeze(dim)
        scores = scores.masked_fill(above if further is None else above & ~further, _NOTHING)
    if plan.same_language:
        foreign = candidates.languages.unsqueeze(1 - dim) != queries.wanted.unsqueeze(dim)
        scores = scores.masked_fill(foreign, _NOTHING)
        further = None if further is None else further & ~foreign
    return _Kept(dim, scores, further)


class _Ledger(NamedTuple):
    """What is known of the candidates of Q queries so far; the own partner is not among them."""

    maxima: Tensor  # [1, K, Q]: of the scores; [2, K, Q] with several positives: and of the negatives' alone
    sums: Tensor  # [1, K, Q]: of exp(score - maximum); [3, K, Q]: and of the further positives' scores, their number

    @classmethod
    def empty(cls, plan: _Plan, queries: int, like: Tensor) -> "_Ledger":
        # The lowest number instead of -inf: a query without candidates must not make inf - inf.
        maxima = like.new_full((1 + plan.several, len(plan.widths), queries), torch.finfo(like.dtype).min)
        return cls(maxima, like.new_zeros(1 + 2 * plan.several, len(plan.widths), queries))

    def at(self, span: slice) -> "_Ledger":
        return _Ledger(self.maxima[..., span], self.sums[..., span])

    def add(self, k: int, tile: _Kept) -> None:
        (maxima, sums), dim = (self.maxima[:, k], self.sums[:, k]), tile.dim
        maximum = torch.maximum(maxima[0], tile.scores.amax(dim))
        sums[0].mul_((maxima[0] - maximum).exp_()).add_((tile.scores - maximum.unsqueeze(dim)).exp_().sum(dim))
        maxima[0] = maximum
        if len(maxima) > 1:
            negatives = tile.scores if tile.further is None else tile.scores.masked_fill(tile.further, _NOTHING)
            maxima[1] = torch.maximum(maxima[1], negatives.amax(dim))
        if tile.further is not None:
            sums[1] += tile.scores.masked_fill(~tile.further, 0).sum(dim)
            sums[2] += tile.further.sum(dim)

    def merge(self, ranks: Ranks) -> None:
        """With the ledgers of the other ranks."""
        before = self.maxima[0].clone()
        ranks.maximum(self.maxima)
        self.sums[0].mul_((before - self.maxima[0]).exp_())
        ranks.total(self.sums)

    def losses(self, own: Tensor) -> Tensor:
        """[K, Q] of queries that score `own` with their partner."""
        losses = self._surplus(own)
        if len(self.sums) > 1:
            losses += own - (own + self.sums[1]) / (1 + self.sums[2])
        return losses

    def hits(self, own: Tensor) -> Tensor:
        """[K, Q] queries whose own partner scores above every negative."""
        return own > self.maxima[-1]

    def slopes(self, own: Tensor, shares: Tensor) -> "_Slopes":
        """For queries of these shares [K, Q] in the loss."""
        surplus = self._surplus(own)
        apart = torch.expm1(-surplus)  # probability of the own partner minus 1, exact where it is nearly 1
        if len(self.sums) == 1:
            return _Slopes(own + surplus - shares.log(), None, shares * apart)
        rate = 1 / (1 + self.sums[2])
        return _Slopes(own + surplus - shares.log(), shares * rate, shares * (apart + (1 - rate)))

    def _surplus(self, own: Tensor) -> Tensor:
        """log-sum over all candidates minus the score of the own partner."""
        difference = self.sums[0].log() + self.maxima[0] - own
        return torch.logaddexp(difference, torch.zeros_like(difference))


class _Slopes(NamedTuple):
    """Derivatives of the loss by the scores: of a candidate exp(score - offset), minus `rate` for a further positive."""

    offsets: Tensor  # [K, Q] log-sum minus the log of the share
    rates: Tensor | None  # [K, Q]
    own: Tensor  # [K, Q] the derivative by the own partner's score

    def at(self, span: slice) -> "_Slopes":
        return _Slopes(
            self.offsets[:, span], None if self.rates is None else self.rates[:, span], self.own[:, span]
        )

    def of(self, k: int, tile: _Kept) -> Tensor:
        slopes = (tile.scores - self.offsets[k].unsqueeze(tile.dim)).exp_()
        if tile.further is not None:
            slopes.sub_(tile.further * self.rates[k].unsqueeze(tile.dim))
        return slopes


class _TileLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, h: Tensor, g: Tensor, scale: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        columns_CW = plan.ranks.all_gather(torch.cat([y, h, g]) if len(h) + len(g) else y)
        from_x = _Ledger.empty(plan, plan.pairs, x)
        from_y = _Ledger.empty(plan, len(plan.shares), x)
        for block, ledger in zip(_blocks(plan, x, y, scale), (from_x, from_x, from_y.at(plan.own)), strict=True):
            row_norms = _inverse_norms(block.rows, plan.widths) * scale
            row_spans, column_spans = block.spans(plan)
            for columns in column_spans:
                columns_TW = columns_CW[block.places[columns]]
                column_norms = _inverse_norms(columns_TW, plan.widths)
                for rows in row_spans:
                    tiles = _tile(plan, block, rows, columns, columns_TW, row_norms, column_norms)
                    for k, (_, kept) in enumerate(tiles):
                        ledger.at(rows).add(k, kept[0])
                        if block.mutual:
                            from_y.at(columns).add(k, kept[1])
        from_y.merge(plan.ranks)
        own_Kn, own = plan.x.scores, plan.own
        losses_Kn = from_x.losses(own_Kn) + from_y.at(own).losses(own_Kn)
        hits_n = from_x.hits(own_Kn)[-1].to(x.dtype) + from_y.at(own).hits(own_Kn)[-1].to(x.dtype)
        shares_KN = plan.weights[:, None] * plan.shares
        slopes_x, slopes_y = from_x.slopes(own_Kn, shares_KN[:, own]), from_y.slopes(plan.y.scores, shares_KN)
        ctx.plan, ctx.slopes = plan, (slopes_x, slopes_y)
        ctx.save_for_backward(x, y, scale, columns_CW)
        accuracy = hits_n.mean() / 2
        ctx.mark_non_differentiable(accuracy)
        return (shares_KN[:, own] * losses_Kn).sum(), accuracy
