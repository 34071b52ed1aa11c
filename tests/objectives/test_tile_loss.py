"""The tile loss against the formulas written out row by row, in one process and in several."""

import math
import textwrap
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import PROGRAMS, ROOT, environment, finish, start, torchrun

from hmde_dist.objectives.tile_loss import Hard, tile_loss


@dataclass
class Batch:
    """A global batch: the vectors are leaves in fp64."""

    x: torch.Tensor
    y: torch.Tensor
    h: torch.Tensor
    g: torch.Tensor
    groups: torch.Tensor
    h_groups: torch.Tensor
    g_groups: torch.Tensor
    weights: torch.Tensor
    x_languages: torch.Tensor
    y_languages: torch.Tensor
    h_languages: torch.Tensor
    g_languages: torch.Tensor
    scale: torch.Tensor

    def part(self, rank: int, size: int) -> "Batch":
        """What one rank holds of it."""
        parts = {f.name: getattr(self, f.name).chunk(size)[rank] for f in fields(self) if f.name != "scale"}
        return leaves(replace(self, **parts))

    def vectors(self) -> list[torch.Tensor]:
        return [self.x, self.y, self.h, self.g, self.scale]


def leaves(batch: Batch) -> Batch:
    names = ("x", "y", "h", "g", "scale")
    return replace(batch, **{name: getattr(batch, name).detach().clone().requires_grad_() for name in names})


def make_batch(pairs=8, width=6, h=8, g=4, groups=5, languages=2, scale=7.0, seed=0) -> Batch:
    """Vectors near enough to each other for a margin to mask some."""
    torch.manual_seed(seed)
    x, y, h_, g_ = (torch.randn(m, width, dtype=torch.float64) for m in (pairs, pairs, h, g))
    return leaves(
        Batch(
            *(x, 0.5 * x + y, h_, g_),
            *(torch.randint(groups, (m,)) for m in (pairs, h, g)),
            torch.rand(pairs, dtype=torch.float64),
            *(torch.randint(languages, (m,)) for m in (pairs, pairs, h, g)),
            torch.tensor([scale], dtype=torch.float64),
        )
    )


@dataclass
class Options:
    hard: str = ""  # of "x", "y", "xy"
    weighted: bool = False
    settings: dict = field(default_factory=dict)


def tiled(batch: Batch, options: Options, **more):
    return tile_loss(
        batch.x,
        batch.y,
        batch.groups,
        batch.scale,
        hard_x=Hard(batch.h, batch.h_groups, batch.h_languages) if "x" in options.hard else None,
        hard_y=Hard(batch.g, batch.g_groups, batch.g_languages) if "y" in options.hard else None,
        weights=batch.weights if options.weighted else None,
        languages=(batch.x_languages, batch.y_languages),
        **options.settings,
        **more,
    )


def reference(batch: Batch, options: Options) -> tuple[torch.Tensor, float]:
    """Loss and accuracy of the whole batch, one row at a time."""
    settings = {"positives": "own", "margin": None, "scope": "all", "widths": None} | options.settings
    pairs = len(batch.x)
    weights = batch.weights if options.weighted else torch.ones(pairs, dtype=torch.float64)
    loss, hits = 0.0, 0
    for width, width_weight in sorted(settings["widths"] or [(batch.x.shape[1], 1.0)]):
        hits = 0
        for side in "xy":
            rows, partners = (batch.x, batch.y) if side == "x" else (batch.y, batch.x)
            partner_languages = batch.y_languages if side == "x" else batch.x_languages
            hard = (batch.h, batch.h_groups, batch.h_languages)
            if side == "y":
                hard = (batch.g, batch.g_groups, batch.g_languages)
            columns, groups, languages = partners, batch.groups, partner_languages
            if side in options.hard:
                columns = torch.cat([columns, hard[0]])
                groups = torch.cat([groups, hard[1]])
                languages = torch.cat([languages, hard[2]])
            for i in range(pairs):
                cosines = torch.cosine_similarity(rows[i, :width], columns[:, :width], dim=-1)
                scores = batch.scale * cosines
                positives, negatives = [i], []
                for j in range(len(columns)):
                    if j == i or (settings["scope"] == "same" and languages[j] != partner_languages[i]):
                        continue
                    if groups[j] == batch.groups[i]:
                        if settings["positives"] == "group" and j < pairs:
                            positives.append(j)
                    elif settings["margin"] is None or cosines[j] <= cosines[i] + settings["margin"]:
                        negatives.append(j)
                logarithms = scores - torch.logsumexp(scores[positives + negatives], 0)
                loss = loss - width_weight * weights[i] * logarithms[positives].mean()
                hits += all(scores[i] > scores[j] for j in negatives)
    return loss / weights.sum(), hits / (2 * pairs)


def assert_equal(batch: Batch, options: Options, **more):
    """Value, accuracy and all gradients, of one process."""
    ours, theirs = leaves(batch), leaves(batch)
    contrast = tiled(ours, options, **more)
    loss, accuracy = reference(theirs, options)
    contrast.loss.backward()
    loss.backward()
    close(contrast.loss, loss)
    assert float(contrast.accuracy) == pytest.approx(accuracy)
    for a, b in zip(ours.vectors(), theirs.vectors(), strict=True):
        close(a.grad, b.grad)


def close(a, b):
    zero = torch.zeros(())
    torch.testing.assert_close(zero if a is None else a, zero.to(a) if b is None else b, rtol=1e-6, atol=1e-9)


MATRYOSHKA = [(2, 0.5), (6, 1.0), (3, 2.0)]
EVERYTHING = {"margin": 0.1, "scope": "same", "widths": MATRYOSHKA}
CASES = {
    "plain": Options(),
    "hard of x": Options("x"),
    "hard of both": Options("xy"),
    "weights": Options(weighted=True),
    "margin": Options("xy", settings={"margin": 0.1}),
    "group": Options("xy", settings={"positives": "group"}),
    "same language": Options("xy", settings={"scope": "same"}),
    "widths": Options("xy", settings={"widths": MATRYOSHKA}),
    "no full width": Options("y", settings={"widths": [(4, 1.0), (1, 0.3)]}),
    "group, margin, language": Options("xy", settings={"positives": "group", "margin": -0.2, "scope": "same"}),
    "everything, own": Options("xy", True, EVERYTHING),
    "everything, group": Options("xy", True, EVERYTHING | {"positives": "group"}),
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("tile", [1, 5, 2048])
def test_value_accuracy_and_gradients_are_those_of_the_formula(options, tile):
    assert_equal(make_batch(), options, tile=tile)


@given(
    st.builds(
        make_batch,
        pairs=st.integers(1, 7),
        width=st.just(6),
        h=st.integers(1, 4),
        g=st.integers(1, 4),
        groups=st.integers(1, 9),
        languages=st.integers(1, 3),
        scale=st.sampled_from([0.1, 1.0, 20.0, 100.0]),
        seed=st.integers(0, 999),
    ),
    st.builds(
        Options,
        hard=st.sampled_from(["", "x", "y", "xy"]),
        weighted=st.booleans(),
        settings=st.fixed_dictionaries(
            {
                "positives": st.sampled_from(["own", "group"]),
                "margin": st.sampled_from([None, -0.3, 0.05, 0.1]),
                "scope": st.sampled_from(["all", "same"]),
                "widths": st.lists(
                    st.tuples(st.integers(1, 6), st.sampled_from([0.25, 1.0])),
                    min_size=1,
                    max_size=3,
                    unique_by=lambda width: width[0],
                )
                | st.none(),
            }
        ),
    ),
    st.integers(1, 9),
)
def test_any_shape_with_any_options(batch, options, tile):
    assert_equal(batch, options, tile=tile)


SCRIPT = """
    import sys
    sys.path[:0] = [TESTS, OBJECTIVES]
    import torch, torch.distributed as dist
    from test_tile_loss import CASES, close, leaves, make_batch, reference, tiled

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, options in CASES.items():
        whole = make_batch(pairs=8, h=8, g=4)
        loss, accuracy = reference(whole, options)
        loss.backward()
        for tile in (1, 5, 2048):
            print(name, tile)
            own = whole.part(rank, world)
            contrast = tiled(own, options, tile=tile)
            contrast.loss.backward()
            means = torch.stack([contrast.loss.detach(), contrast.accuracy, own.scale.grad[0]])
            dist.all_reduce(means)
            close(means / world, torch.stack([loss.detach(), torch.tensor(accuracy).double(), whole.scale.grad[0]]))
            for vectors, of_all in zip(own.vectors()[:4], whole.vectors()[:4]):
                expected = None if of_all.grad is None else of_all.grad.chunk(world)[rank]
                close(None if vectors.grad is None else vectors.grad / world, expected)
            assert contrast.negatives == 7 + max(8 * ("x" in options.hard), 4 * ("y" in options.hard))
    dist.destroy_process_group()
"""


def run_ranks(world: int, text: str, folder: Path):
    here = Path(__file__).parent
    script = folder / "ranks.py"
    text = textwrap.dedent(text).replace("TESTS, OBJECTIVES", f"{str(here.parent)!r}, {str(here)!r}")
    script.write_text(text, encoding="utf-8")
    job = finish(start(torchrun(world, script), environment()))
    assert job.code == 0, job.output


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_formula_on_the_whole_batch(world, tmp_path):
    run_ranks(world, SCRIPT, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positives", ["own", "group"])
def test_a_row_with_no_negative_costs_nothing(dtype, positives):
    x, y = torch.randn(2, 3, 4, dtype=dtype)
    x.requires_grad_()
    groups = torch.tensor([5, 5, 5])
    languages = torch.arange(3), torch.arange(3)
    scope = "all" if positives == "own" else "same"
    contrast = tile_loss(x, y, groups, torch.tensor([1000.0]), positives=positives, languages=languages, scope=scope)
    contrast.loss.backward()
    assert contrast.loss.item() == 0 and contrast.accuracy.item() == 1
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("positives", ["own", "group"])
def test_extremes_stay_finite(positives):
    eye, ones = torch.eye(4), torch.ones(4, 4)
    # A row of pair 0 or 3 has 2 negatives, and with "group" a further positive; one of pair 1 or 2 has 3.
    candidates = [3, 4, 4, 3] if positives == "own" else [4, 4, 4, 4]
    alike = 2 * sum(map(math.log, candidates)) / 4
    for x, y, expected in ((eye, -eye, None), (eye, eye, 0 if positives == "own" else None), (ones, ones, alike)):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        scale = torch.tensor([1000.0], requires_grad=True)
        contrast = tile_loss(x, y, torch.tensor([0, 1, 2, 0]), scale, positives=positives, tile=3)
        contrast.loss.backward()
        for tensor in (contrast.loss, x.grad, y.grad, scale.grad):
            assert tensor.isfinite().all()
        assert expected is None or contrast.loss.item() == pytest.approx(expected, abs=1e-3)


def test_no_weight_at_all_is_no_loss():
    batch = make_batch()
    batch = replace(batch, weights=torch.zeros_like(batch.weights))
    contrast = tiled(batch, Options("xy", True))
    contrast.loss.backward()
    assert contrast.loss.item() == 0 and batch.x.grad.abs().max() == 0


def test_bf16_vectors_are_scored_in_fp32_even_under_autocast():
    batch = make_batch(width=64)
    x, y = (v.detach().bfloat16().requires_grad_() for v in (batch.x, batch.y))
    a, b = (v.detach().float().requires_grad_() for v in (x, y))
    scale = torch.tensor([20.0])
    expected = tile_loss(a, b, batch.groups, scale)
    expected.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        contrast = tile_loss(x, y, batch.groups, scale)
        contrast.loss.backward()
    assert contrast.loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(contrast.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.float(), a.grad, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(y.grad.float(), b.grad, rtol=1e-2, atol=1e-5)


def test_without_gradient_every_tile_is_made_once(monkeypatch):
    made = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: made.append(1) or matmul(a, b))
    batch = make_batch()
    with torch.no_grad():
        contrast = tiled(batch, Options(), tile=4)
    assert len(made) == 4 and not contrast.loss.requires_grad
    tiled(batch, Options(), tile=4).loss.backward()
    assert len(made) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(2, 4)}, "alike"),
        ({"groups": torch.zeros(2)}, "one a row"),
        ({"weights": torch.zeros(2)}, "one a row"),
        ({"hard_x": Hard(torch.ones(2, 5), torch.zeros(2))}, r"\[m, 4\]"),
        ({"hard_x": Hard(torch.ones(2, 4), torch.zeros(3))}, "one a row"),
        ({"scope": "same"}, "languages"),
        ({"scope": "none"}, "scope"),
        ({"positives": "all"}, "positives"),
        ({"widths": [(5, 1.0)]}, "from 1 to 4"),
        ({"widths": []}, "from 1 to 4"),
        ({"widths": [(2, 0.0)]}, "above 0"),
        ({"tile": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"x": torch.ones(3, 4), "y": torch.ones(3, 4), "groups": torch.zeros(3), "scale": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        tile_loss(**given | change)


def test_the_matrix_of_scores_is_never_held():
    """1,024 rows as rank 0 of 64, against 65,536 columns: less memory than that of one matrix of scores, 256 MiB."""
    options = ("--pairs", "1024", "--ranks", "64", "--loss", "tiles")
    job = finish(start([PROGRAMS / "python", ROOT / "tools" / "bench_loss.py", *options]))
    assert job.code == 0, job.output
    assert 0 < float(job.output.split()[-1]) < 256
