import math
import textwrap

import pytest
import torch

from hmde_dist.objectives.document_contrast import Objective, Settings, spread_out
from hmde_dist.objectives.gather import Ranks


def document_contrast(documents, groups, scale, sides=2, ranks=None, **settings):
    """The objective on documents that came in another order than that of the batch."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(3))
    rows = {"documents": documents[order], "groups": groups[order], "numbers": order}
    rows["sides"] = torch.full_like(order, sides)
    objective = Objective(Settings(name="document_contrast", **settings), None)
    return objective.loss(rows, {"scale": scale}, ranks or Ranks())


def by_hand(x, y, groups, scale):
    """The loss of the paper, one row at a time, in plain Python."""
    total = 0.0
    for anchors, candidates in ((x, y), (y, x)):
        for i in range(len(x)):
            scores = [
                scale * float(torch.cosine_similarity(anchors[i], candidates[j], dim=0))
                for j in range(len(x))
                if j == i or groups[j] != groups[i]
            ]
            own = scale * float(torch.cosine_similarity(anchors[i], candidates[i], dim=0))
            total += math.log(sum(math.exp(s) for s in scores)) - own
    return total / len(x)


@pytest.mark.parametrize("groups", [[1, 2, 3, 4, 5], [1, 2, 1, 4, 1]])
def test_the_loss_is_the_formula_and_versions_of_one_document_are_no_negatives(groups):
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 8, dtype=torch.float64)
    contrast = document_contrast(torch.cat([x, y]), torch.tensor(groups * 2), torch.tensor([20.0]))
    assert float(contrast.loss) == pytest.approx(by_hand(x, y, groups, 20.0), rel=1e-5)
    assert contrast.negatives == 4


def test_explicit_negatives_join_the_candidates_of_their_side():
    """L1 over [y, h], L2 over [x, g]; a negative that is a version of the anchor's own document does not count."""
    torch.manual_seed(1)
    x, y, h, g = torch.randn(4, 3, 8, dtype=torch.float64)
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 7, 0, 8, 9, 9, 1])
    loss = 0.0
    for anchors, partners, hard, hard_groups in ((x, y, h, [7, 0, 8]), (y, x, g, [9, 9, 1])):
        for i in range(3):
            candidates = [*partners] + [v for v, group in zip(hard, hard_groups, strict=True) if group != i]
            scores = 20 * torch.stack([torch.cosine_similarity(anchors[i], c, dim=0) for c in candidates])
            loss += float(torch.logsumexp(scores, 0) - scores[i]) / 3
    contrast = document_contrast(torch.cat([x, y, h, g]), groups, torch.tensor([20.0]), sides=4)
    assert float(contrast.loss) == pytest.approx(loss, rel=1e-5)
    assert contrast.negatives == 5


def by_hand_with_same_side(x, y, h, g, groups, h_groups, g_groups, scale, margin):
    """Candidates of x_i: y, h and the other x; of y_i: x, g and the other y; none of its own group but its partner."""
    total = 0.0
    for rows, partners, hard, hard_groups in ((x, y, h, h_groups), (y, x, g, g_groups)):
        columns, of_group = torch.cat([partners, rows, hard]), [*groups, *groups, *hard_groups]
        for i in range(len(rows)):
            cosines = torch.stack([torch.cosine_similarity(rows[i], one, dim=0) for one in columns])
            counts = [
                j == i or (of_group[j] != groups[i] and (margin is None or bool(cosines[j] <= cosines[i] + margin)))
                for j in range(len(columns))
            ]
            total = total + (scale * cosines[torch.tensor(counts)]).logsumexp(0) - scale * cosines[i]
    return total / len(x)


@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("explicit", [False, True])
def test_documents_of_the_same_side_are_negatives_where_asked(explicit, margin):
    torch.manual_seed(4)
    groups, h_groups, g_groups = [1, 2, 1, 4, 5], [7, 2, 8, 9, 1], [3, 3, 4, 6, 5]
    x, y, h, g = torch.randn(4, 5, 8, dtype=torch.float64).unbind()
    parts = [part.clone().requires_grad_() for part in ((x, y, h, g) if explicit else (x, y))]
    facts = torch.tensor(groups * 2 + (h_groups + g_groups) * explicit)
    scale, sides = torch.tensor([6.0], dtype=torch.float64, requires_grad=True), len(parts)
    contrast = document_contrast(torch.cat(parts), facts, scale, sides, same_side=True, margin=margin)
    contrast.loss.backward()
    expected = [part.detach().clone().requires_grad_() for part in (*parts, scale)]
    if not explicit:
        h_groups = g_groups = []
    h, g = expected[2:4] if explicit else (x[:0], x[:0])
    loss = by_hand_with_same_side(*expected[:2], h, g, groups, h_groups, g_groups, expected[-1], margin)
    loss.backward()
    torch.testing.assert_close(contrast.loss, loss[0], rtol=1e-6, atol=1e-9)
    for found, theirs in zip((*parts, scale), expected, strict=True):
        torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert contrast.negatives == (13 if explicit else 8)


def test_accuracy_counts_both_directions():
    x = torch.eye(4)
    y = torch.eye(4)[[1, 0, 2, 3]]
    contrast = document_contrast(torch.cat([x, y]), torch.arange(4).repeat(2), torch.tensor([20.0]))
    assert float(contrast.accuracy) == 0.5


def test_scores_far_apart_stay_finite():
    x = torch.eye(3)
    y = -torch.eye(3)
    contrast = document_contrast(torch.cat([x, y]), torch.arange(3).repeat(2), torch.tensor([1000.0]))
    assert torch.isfinite(contrast.loss)


GATHERED = """
    import torch, torch.distributed as dist
    from test_document_contrast import document_contrast
    from hmde_dist.objectives.gather import Ranks

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    inputs, groups = torch.randn(4 if hard else 2, 12, 6), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 11])
    groups = torch.cat([groups, groups, (groups + 1) % 9, (groups + 2) % 9][: len(inputs)]).view(-1, 12)
    weight, scale = torch.randn(6, 6), torch.tensor([20.0])

    def gradients(inputs, groups, mean, ranks=None):
        w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        contrast = document_contrast(inputs.flatten(0, 1) @ w, groups.flatten(), s, 4 if hard else 2, ranks, spread=0.5, same_side=hard)
        contrast.loss.backward()
        found = [contrast.loss.detach(), w.grad, s.grad]
        if mean:
            for tensor in found:
                dist.all_reduce(tensor)
                tensor /= world
        return found

    part = slice(rank * 12 // world, (rank + 1) * 12 // world)
    found = gradients(inputs[:, part], groups[:, part], mean=True)
    expected = gradients(inputs, groups, mean=False, ranks=Ranks(alone=True))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(("world", "hard"), [(2, False), (4, False), (2, True)])
def test_gathered_loss_weight_and_scale_gradients_equal_one_process_with_the_whole_batch(world, hard, forks):
    ended = forks.run(world, f"hard = {hard}\n{textwrap.dedent(GATHERED)}")
    assert ended.codes == [0] * world, ended.output


def test_every_version_of_a_document_is_a_right_answer_where_asked():
    """Equal to the mean over positives of -log p (Khosla et al. 2020, eq. 2), and with one positive to the pairwise loss."""
    torch.manual_seed(2)
    x, y = torch.randn(2, 5, 8)
    scale = torch.tensor([5.0])
    one = torch.arange(5).repeat(2)
    pairwise = document_contrast(torch.cat([x, y]), one, scale)
    assert float(document_contrast(torch.cat([x, y]), one, scale, positives="group").loss) == pytest.approx(
        float(pairwise.loss), rel=1e-6
    )
    several = torch.tensor([1, 2, 1, 4, 1])
    total = 0.0
    for anchors, candidates in ((x, y), (y, x)):
        scores = 5 * torch.nn.functional.cosine_similarity(anchors[:, None], candidates[None], dim=-1)
        right = several[:, None] == several
        total += float((-(scores.log_softmax(1) * right).sum(1) / right.sum(1)).mean())
    found = document_contrast(torch.cat([x, y]), several.repeat(2), scale, positives="group")
    assert float(found.loss) == pytest.approx(total, rel=1e-5)


def test_spread_out_is_the_mean_squared_cosine_of_different_vectors():
    vectors = torch.randn(7, 5)
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    expected = cosines.square().fill_diagonal_(0).sum() / (7 * 6)
    assert float(spread_out(vectors, Ranks())) == pytest.approx(float(expected), rel=1e-5)
    assert float(spread_out(torch.ones(4, 5), Ranks())) == pytest.approx(1.0)  # collapsed
