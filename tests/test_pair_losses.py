# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Each loss of pairs against its formula written out once more, its gradients, its limits, and that no row reads another."""

import math

import pytest
import torch

from trl_diffusion.losses import (
    PAIR_LOSSES,
    PairErrors,
    PairSettings,
    diffusion_dpo_loss,
    image_terms,
    instance_terms,
    pair_errors,
    safeguard_scale,
)
from trl_diffusion.masks import instance_masks, instance_regions
from trl_diffusion.noising import per_sample_errors


PAIRS, SHAPE = 3, (2, 4, 6)
# Settings under which errors near 1 give margins near 1
SETTINGS = {
    "sigmoid": PairSettings(3.0),
    "smoothed": PairSettings(3.0, 0.2),
    "ipo": PairSettings(3.0),
    "hinge": PairSettings(3.0),
    "mapo": PairSettings(0.1, num_timesteps=10),
    "dspo": PairSettings(0.7),
    "dmpo": PairSettings(3.0, 0.01),
}
NAMES = list(SETTINGS)


def loss_of(name: str, errors: PairErrors, settings: PairSettings | None = None):
    return PAIR_LOSSES["sigmoid" if name == "smoothed" else name](errors, settings or SETTINGS[name])


def errors(seed: int = 0, shape: tuple[int, ...] = (5,), dtype=torch.float64) -> PairErrors:
    generator = torch.Generator().manual_seed(seed)
    return PairErrors(*torch.rand(5, *shape, generator=generator, dtype=torch.float64).to(dtype))


def predictions(seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy, reference and target, `(2B, C, h, w)`."""
    generator = torch.Generator().manual_seed(seed)
    target, *steps = torch.randn(3, 2 * PAIRS, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    ref_pred = target + 0.8 * steps[0]
    return ref_pred + 0.5 * steps[1], ref_pred, target


def boxes_and_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes in the chosen and in the rejected images, judged, conflicts: none, one of two in conflict, a tie beside a conflict."""
    chosen = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.4, 0.3, 0.9, 0.8]]).expand(PAIRS, 2, 4)
    rejected = torch.tensor([[0.5, 0.0, 1.0, 1.0], [0.1, 0.1, 0.4, 0.6]]).expand(PAIRS, 2, 4)
    judged = torch.tensor([[False, False], [True, True], [False, True]])
    return chosen, rejected, judged, torch.tensor([[False, False], [True, False], [False, True]])


def masks(w_neg: float) -> torch.Tensor:
    chosen, rejected, judged, conflicts = boxes_and_labels()
    return torch.cat([instance_masks(boxes, judged, conflicts, *SHAPE[1:], w_neg) for boxes in (chosen, rejected)])


def grouped():
    chosen, rejected, judged, conflicts = boxes_and_labels()
    regions = torch.cat([instance_regions(boxes, judged, *SHAPE[1:]) for boxes in (chosen, rejected)])
    return instance_terms(regions, conflicts)


# ---- Each loss is its formula ----


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written_out(name: str, d_w: float, d_l: float, r_w: float, r_l: float, beta: float) -> float:
    """The formula in plain numbers; DSPO's, which needs vectors, is below."""
    u = -0.5 * beta * ((d_w - r_w) - (d_l - r_l))
    if name == "sigmoid":
        return math.log(1 + math.exp(-u))
    if name == "smoothed":
        return 0.8 * math.log(1 + math.exp(-u)) + 0.2 * math.log(1 + math.exp(u))
    if name == "ipo":  # TRL's of the margin without beta, times beta^2
        margin = -0.5 * ((d_w - r_w) - (d_l - r_l))
        return beta**2 * (margin - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - u)
    if name == "mapo":
        f_w, f_l = ((0.5 * d) / (math.exp(0.5 * d) - 1) for d in (d_w, d_l))
        return d_w - beta * math.log(sigma(10 * (f_w - f_l)))
    assert name == "dmpo"
    p, q = sigma(u), 0.99
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("shape", [(5,), (3, 2)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dspo"])
def test_a_loss_is_its_formula(name, shape):
    """Pair by pair, and region by region, each loss is the formula in plain numbers."""
    given = errors(shape=shape)
    losses, *_ = loss_of(name, given)
    assert losses.shape == shape
    for index, loss in enumerate(losses.flatten().tolist()):
        values = [part.flatten()[index].item() for part in given[:4]]
        assert loss == pytest.approx(written_out(name, *values, SETTINGS[name].beta), abs=1e-10)


@pytest.mark.parametrize("w_neg", [None, 0.0, -0.5])
def test_dspo_is_the_mean_over_positions(w_neg):
    """From predictions: mean of M |(e_w - eps) - beta (1 - sigma(u)) (e_w - e_ref_w)|^2, at any mask."""
    model_pred, ref_pred, target = predictions()
    weights = torch.ones(2 * PAIRS, *SHAPE[1:]) if w_neg is None else masks(w_neg)
    losses, *_ = loss_of("dspo", pair_errors(model_pred, ref_pred, target, image_terms(weights)))
    weights = weights.double()
    for pair in range(PAIRS):
        e_w, r_w, eps_w, m_w = model_pred[pair], ref_pred[pair], target[pair], weights[pair]
        e_l, r_l, eps_l, m_l = (values[PAIRS + pair] for values in (model_pred, ref_pred, target, weights))
        chosen = (m_w * ((e_w - eps_w) ** 2 - (r_w - eps_w) ** 2)).mean()
        rejected = (m_l * ((e_l - eps_l) ** 2 - (r_l - eps_l) ** 2)).mean()
        k = 0.7 * (1 - torch.sigmoid(-0.5 * 0.7 * (chosen - rejected)))
        expected = (m_w * ((e_w - eps_w) - k * (e_w - r_w)) ** 2).mean()
        assert losses[pair, 0].item() == pytest.approx(expected.item(), rel=1e-5)  # errors are float32


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    """Autograd's gradient of each loss with respect to each error, in float64; none at hinge's corner."""
    given = errors(1)

    def losses(*values):
        return loss_of(name, PairErrors(*values))[0]

    assert torch.autograd.gradcheck(losses, [part.requires_grad_() for part in given])


@pytest.mark.parametrize("name", NAMES)
def test_descent_lowers_the_chosen_error_and_raises_the_rejected_one(name):
    """The signs of the gradient where policy and reference are one; DSPO's comparison is in its step, not in its sign there."""
    chosen, rejected, drift = torch.tensor([[0.6], [0.5], [0.0]], dtype=torch.float64)
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, *_ = loss_of(name, PairErrors(chosen, rejected, chosen.detach(), rejected.detach(), drift))
    to_chosen, to_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert to_chosen > 0
    assert to_rejected == 0 if name == "dspo" else to_rejected < 0


@pytest.mark.parametrize("name", NAMES)
def test_a_row_reads_no_other_row(name):
    """A loss, its rewards and its gradient are those of the row alone: nothing is averaged or decided over a batch."""
    given = errors(2)
    whole = torch.stack([part.detach() for part in loss_of(name, given)])
    for row in range(5):
        alone = loss_of(name, PairErrors(*(part[row : row + 1] for part in given)))
        assert torch.equal(whole[:, row : row + 1], torch.stack(alone))
    chosen = given.chosen.clone().requires_grad_()
    losses, *_ = loss_of(name, given._replace(chosen=chosen))
    (gradient,) = torch.autograd.grad(losses[0], chosen)
    assert gradient[0] != 0 and (gradient[1:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_rewards_have_no_gradient(name):
    """Only the losses are differentiable."""
    losses, *rewards = loss_of(name, PairErrors(*(part.requires_grad_() for part in errors())))
    assert losses.requires_grad and not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize("name", NAMES)
def test_large_errors_and_margins_stay_finite(name):
    """At errors of 0, 1e-8 and 1000, with beta 5000, losses and gradients are finite in float32."""
    values = torch.tensor([0.0, 1e-8, 1e-3, 1000.0])
    grid = torch.cartesian_prod(values, values).T.contiguous().requires_grad_()
    settings = SETTINGS[name]._replace(beta=5000.0 if name not in ("mapo", "dspo") else SETTINGS[name].beta)
    losses, *_ = loss_of(name, PairErrors(*grid, *grid.detach().flip(0), torch.zeros(16)), settings)
    (gradient,) = torch.autograd.grad(losses.sum(), grid)
    assert losses.isfinite().all() and gradient.isfinite().all()


# ---- Limits ----


def test_without_smoothing_the_sigmoid_is_diffusion_dpo():
    """Bit for bit, losses and rewards."""
    given = errors(3, dtype=torch.float32)
    ours, dpo = loss_of("sigmoid", given), diffusion_dpo_loss(*given[:4], 3.0)
    assert all(torch.equal(one, other) for one, other in zip(ours, dpo, strict=True))


def at_margin(u: float, beta: float = 3.0) -> PairErrors:
    """Errors whose margin is `u`."""
    zero = torch.zeros(1, dtype=torch.float64)
    return PairErrors(zero - 2 * u / beta, zero, zero, zero, zero)


@pytest.mark.parametrize(
    ("name", "minimum"),
    # (1-a) sigma(-u) = a sigma(u); u = 1/2; p = q, so u = log 99
    [("smoothed", math.log(0.8 / 0.2)), ("ipo", 0.5), ("dmpo", math.log(0.99 / 0.01))],
)
def test_where_a_loss_has_its_minimum(name, minimum):
    """A smoothed label, IPO and DMPO stop at a margin: no gradient there, and more loss on both sides."""
    errors = at_margin(minimum)
    chosen = errors.chosen.requires_grad_()
    losses, *_ = loss_of(name, errors)
    assert torch.autograd.grad(losses.sum(), chosen)[0].abs() < 1e-6
    assert all(loss_of(name, at_margin(minimum + step))[0] > losses for step in (-0.3, 0.3))


def test_hinge_stops_above_a_margin_of_1():
    """Below 1 its slope in the margin is -1, above it 0, and a margin of 3 costs as little as one of 1."""
    for u, loss, slope in ((-2.0, 3.0, -1.0), (0.5, 0.5, -1.0), (3.0, 0.0, 0.0)):
        margin_errors = at_margin(u)
        chosen = margin_errors.chosen.requires_grad_()
        losses, *_ = loss_of("hinge", margin_errors)
        assert losses.item() == pytest.approx(loss)
        # du / d(chosen error) = -beta / 2
        assert torch.autograd.grad(losses.sum(), chosen)[0].item() == pytest.approx(-1.5 * slope)


def test_ipo_without_the_factor_has_a_gradient_a_million_times_smaller():
    """At beta 2000 and the start: the sigmoid's slope is 1/2 per margin, published IPO's 1 / beta^2, and ours 1."""
    margin = torch.zeros((), dtype=torch.float64, requires_grad=True)
    published = (margin / 2000 - 1 / (2 * 2000)).square()
    slopes = [torch.autograd.grad(loss, margin)[0].item() for loss in (published, (margin - 0.5).square())]
    assert slopes == pytest.approx([-1 / 2000**2, -1.0])
    errors = at_margin(0.0, 2000.0)
    chosen = errors.chosen.requires_grad_()
    losses, *_ = loss_of("ipo", errors, PairSettings(2000.0))
    assert torch.autograd.grad(losses.sum(), chosen)[0].item() == pytest.approx(1000.0)  # -beta/2 times -1


def test_dmpo_tends_to_the_share_of_wrong_labels():
    """As alpha goes to 0, the loss divided by log(1/alpha) goes to 1 - p = sigma(-u)."""
    for u in (-1.0, 0.0, 2.0):
        distances = []
        for alpha in (1e-2, 1e-6, 1e-12, 1e-30):
            loss = loss_of("dmpo", at_margin(u), PairSettings(3.0, alpha))[0].item()
            distances.append(abs(loss / math.log(1 / alpha) - sigma(-u)))
        assert distances == sorted(distances, reverse=True) and distances[-1] < 0.011  # at most log 2 / log 1e30


def test_mapo_by_hand():
    """Errors 0: f = 1 on both sides, so L = beta log 2, and the slope of f there is -1/4; large errors: f = 0, L = d + ..."""
    chosen, rejected = torch.zeros(2, 1, dtype=torch.float64).requires_grad_()
    losses, *rewards = loss_of("mapo", PairErrors(chosen, rejected), PairSettings(0.1))
    assert losses.item() == pytest.approx(0.1 * math.log(2)) and [x.item() for x in rewards] == [100.0, 100.0]
    # 1 + beta sigma(0) T / 4
    slopes = [slope.item() for slope in torch.autograd.grad(losses.sum(), [chosen, rejected])]
    assert slopes == pytest.approx([1 + 0.1 * 0.5 * 1000 / 4, -0.1 * 0.5 * 1000 / 4])


@pytest.mark.parametrize("error", [1e-7, 1e-3, 0.19, 0.21, 3.0])
def test_mapo_in_float32_has_the_gradient_of_float64(error):
    """The quotient's derivative would be a difference of two terms of size 1/d; the series near 0 has no such loss."""
    slopes = []
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([error], dtype=dtype, requires_grad=True)
        losses, *_ = loss_of("mapo", PairErrors(chosen, torch.full_like(chosen, error)), PairSettings(0.1))
        slopes.append(torch.autograd.grad(losses.sum(), chosen)[0].item())
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


def test_dspo_at_the_reference_and_at_beta_0():
    """Where the policy is the reference, and where beta is next to nothing, it is the chosen error: supervised fine-tuning."""
    model_pred, ref_pred, target = predictions()
    terms = image_terms(torch.ones(2 * PAIRS, *SHAPE[1:]))
    for errors, beta in (
        (pair_errors(ref_pred, ref_pred, target, terms), 0.7),
        (pair_errors(model_pred, ref_pred, target, terms), 1e-12),
    ):
        torch.testing.assert_close(loss_of("dspo", errors, PairSettings(beta))[0], errors.chosen)


# ---- Masks, on every loss ----


@pytest.mark.parametrize("name", NAMES)
def test_w_neg_1_is_no_mask(name):
    """Under the masks of `w_neg=1`, each loss is that of the plain errors; under those of `w_neg=0` it is another one."""
    model_pred, ref_pred, target = predictions(dtype=torch.float32)
    losses = [loss_of(name, pair_errors(model_pred, ref_pred, target, image_terms(masks(w))))[0] for w in (1.0, 0.0)]
    plain = [per_sample_errors(pred, target).chunk(2) for pred in (model_pred, ref_pred)]
    drift = per_sample_errors(model_pred, ref_pred).chunk(2)[0]
    expected = loss_of(name, PairErrors(*plain[0], *plain[1], drift))[0]
    assert torch.equal(losses[0][:, 0], expected)
    assert (losses[1][1:, 0] - expected[1:]).abs().min() > 1e-4  # pairs with an instance in conflict


@pytest.mark.parametrize("name", NAMES)
def test_reversed_terms_are_swapped_columns(name):
    """Turning every label round gives bit for bit what exchanging the two images gives, grouped or not."""
    model_pred, ref_pred, target = predictions(dtype=torch.float32)
    exchanged = [values.roll(PAIRS, dims=0) for values in (model_pred, ref_pred, target)]
    for terms in (image_terms(masks(-0.5)), grouped()):
        reversed_terms = terms._replace(is_swapped=~terms.is_swapped)
        exchanged_terms = terms._replace(masks=terms.masks.roll(PAIRS, dims=0))
        one = loss_of(name, pair_errors(model_pred, ref_pred, target, reversed_terms))
        other = loss_of(name, pair_errors(*exchanged, exchanged_terms))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        scales = (
            safeguard_scale(model_pred, target, reversed_terms, 0.3),
            safeguard_scale(exchanged[0], exchanged[2], exchanged_terms, 0.3),
        )
        assert torch.equal(*scales)


# ---- Grouped instances ----


@pytest.mark.parametrize("name", NAMES)
def test_grouped_without_instances_is_the_plain_loss(name):
    """The only term is the background, the whole image: bit for bit the loss without masks."""
    model_pred, ref_pred, target = predictions(dtype=torch.float32)
    no_boxes, none = torch.zeros(2 * PAIRS, 0, 4), torch.zeros(2 * PAIRS, 0, dtype=torch.bool)
    terms = instance_terms(instance_regions(no_boxes, none, *SHAPE[1:]), none[:PAIRS])
    plain = image_terms(torch.ones(2 * PAIRS, *SHAPE[1:]))
    losses, expected = (loss_of(name, pair_errors(model_pred, ref_pred, target, each))[0] for each in (terms, plain))
    assert torch.equal(terms.mean(losses), expected[:, 0])


def test_grouped_dpo_by_loops():
    """One -log sigma for each judged instance with its own sign, one for the background with the pair's, and their mean."""
    model_pred, ref_pred, target = predictions()
    terms = grouped()
    losses = terms.mean(loss_of("sigmoid", pair_errors(model_pred, ref_pred, target, terms))[0])
    _, _, judged, conflicts = boxes_and_labels()
    # By hand from the boxes on 4 x 6 cells: first [rows 0-4, columns 0-3] in chosen, [0-4, 3-6] in rejected
    coverage = [torch.zeros(2, *SHAPE[1:], dtype=torch.float64) for _ in range(2)]
    coverage[0][0, :, :3], coverage[0][1, :, 3:] = 1, 1
    rows = [torch.tensor([0, 0.8, 1, 0.2]), torch.tensor([0.6, 1, 0.4, 0])]  # 0.3-0.8 and 0.1-0.6 of 4 rows
    columns = [torch.tensor([0, 0, 0.6, 1, 1, 0.4]), torch.tensor([0.4, 1, 0.4, 0, 0, 0])]  # 0.4-0.9 and 0.1-0.4 of 6
    for image in range(2):
        coverage[1][image] = torch.outer(rows[image], columns[image])
    squares = [(pred - target) ** 2 for pred in (model_pred, ref_pred)]

    def gain(image: int, pair: int, weights: torch.Tensor) -> torch.Tensor:
        index = image * PAIRS + pair
        policy, reference = ((weights * square[index].mean(dim=0)).sum() / weights.sum() for square in squares)
        return policy - reference

    for pair in range(PAIRS):
        found, free = [], torch.ones(2, *SHAPE[1:], dtype=torch.float64)
        for instance in range(2):
            if judged[pair, instance]:
                weights = coverage[instance]
                chosen, rejected = (gain(image, pair, weights[image]) for image in range(2))
                sign = -1 if conflicts[pair, instance] else 1
                found.append(-torch.nn.functional.logsigmoid(-0.5 * 3.0 * sign * (chosen - rejected)))
                # Cells that two boxes cut in part do not occur: the first box ends where cells end
                free = free * (1 - weights)
        chosen, rejected = (gain(image, pair, free[image]) for image in range(2))
        found.append(-torch.nn.functional.logsigmoid(-0.5 * 3.0 * (chosen - rejected)))
        assert losses[pair].item() == pytest.approx(torch.stack(found).mean().item(), rel=2e-4), (
            pair
        )  # edges: 1/4096 of a cell


def test_a_region_that_is_cut_away_has_no_term():
    """An instance outside the crop of one image, a tie and padding count nowhere; covered images have no background."""
    chosen = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.5, 0.5, 1.0]], [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    rejected = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.5, 1.0], [0.0] * 4]])
    judged = torch.tensor([[True, True], [True, False]])
    regions = torch.cat([instance_regions(boxes, judged, 4, 4) for boxes in (chosen, rejected)])
    terms = instance_terms(regions, torch.tensor([[True, False], [False, True]]))
    assert terms.exists.tolist() == [[True, False, True], [True, False, False]]
    assert terms.is_swapped.tolist() == [[True, False, False], [False, True, False]]  # the last has no term
    assert terms.mean(torch.tensor([[1.0, 7.0, 3.0], [5.0, 7.0, 7.0]])).tolist() == [2.0, 5.0]


def test_a_pair_without_terms_has_loss_0_and_no_gradient():
    """Where each image is covered by an instance that the other does not show, nothing can be compared, and nothing is NaN."""
    chosen = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    judged = torch.ones(1, 2, dtype=torch.bool)
    regions = torch.cat([instance_regions(boxes, judged, *SHAPE[1:]) for boxes in (chosen, chosen.flip(1))])
    terms = instance_terms(regions, torch.zeros(1, 2, dtype=torch.bool))
    assert not terms.exists.any()
    model_pred, ref_pred, target = (values[:2].float() for values in predictions())
    losses = terms.mean(loss_of("sigmoid", pair_errors(model_pred.requires_grad_(), ref_pred, target, terms))[0])
    assert losses.tolist() == [0.0] and torch.autograd.grad(losses.sum(), model_pred)[0].eq(0).all()


def test_padding_instances_changes_nothing():
    """A pair has the same loss alone and beside a pair with more instances."""
    model_pred, ref_pred, target = predictions(dtype=torch.float32)
    terms = grouped()
    whole = terms.mean(loss_of("sigmoid", pair_errors(model_pred, ref_pred, target, terms))[0])
    chosen, rejected, judged, conflicts = boxes_and_labels()
    for pair, kept in ((0, []), (1, [0, 1]), (2, [1])):
        regions = [
            instance_regions(boxes[pair : pair + 1, kept], judged[pair : pair + 1, kept], *SHAPE[1:])
            for boxes in (chosen, rejected)
        ]
        alone = instance_terms(torch.cat(regions), conflicts[pair : pair + 1, kept])
        rows = [values[[pair, PAIRS + pair]] for values in (model_pred, ref_pred, target)]
        torch.testing.assert_close(
            alone.mean(loss_of("sigmoid", pair_errors(*rows, alone))[0]), whole[pair : pair + 1]
        )
