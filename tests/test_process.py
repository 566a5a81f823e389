# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A process is its four numbers, and everything else follows from them as diffusers has it."""

import copy
import json

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from trl_diffusion.inversion import invert_latents
from trl_diffusion.process import DiscreteProcess, Process, RectifiedFlow


SCHEDULER = DDPMScheduler(
    1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    variance_type="fixed_small",
)
ALPHAS_CUMPROD = SCHEDULER.alphas_cumprod
SIZE = (8, 8)  # of the latents
FLOW_SCHEDULER = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
PROCESSES = {
    "noise": DiscreteProcess(ALPHAS_CUMPROD, "epsilon"),
    "velocity": DiscreteProcess(ALPHAS_CUMPROD, "v_prediction"),
    "flow": RectifiedFlow(),
}
TIMESTEPS = {
    "noise": torch.tensor([0, 1, 250, 500, 998, 999]),
    "velocity": torch.tensor([0, 1, 250, 500, 998, 999]),
    "flow": torch.tensor([0.5, 1.0, 250.25, 500.0, 990.0, 999.5]),
}
KINDS = list(PROCESSES)
SHAPE = (6, 4, 8, 8)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def keys(num: int) -> list[tuple]:
    return [(0, 0, f"row-{index}") for index in range(num)]


def chi_squared(values: torch.Tensor, cdf_values: torch.Tensor) -> float:
    """Pearson's statistic of equal shares of the distribution, as standard deviations above its mean."""
    num_shares = 20
    counts = torch.bincount((cdf_values * num_shares).long().clamp(0, num_shares - 1), minlength=num_shares).double()
    expected = len(values) / num_shares
    statistic = ((counts - expected).square() / expected).sum().item()
    return (statistic - (num_shares - 1)) / (2 * (num_shares - 1)) ** 0.5


# ---- The table ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_numbers(kind):
    """a, s, p and q are those of the table, at every depth, and the determinant is a p - s q."""
    timesteps = TIMESTEPS[kind]
    if kind == "flow":
        a, s = 1 - timesteps.double() / 1000, timesteps.double() / 1000
    else:
        a, s = ALPHAS_CUMPROD.double()[timesteps].sqrt(), (1 - ALPHAS_CUMPROD.double())[timesteps].sqrt()
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    p, q = {"noise": (one, zero), "velocity": (a, -s), "flow": (one, -one)}[kind]
    c = PROCESSES[kind].coefficients(timesteps)
    for ours, expected in zip(c, (a, s, p, q, a * p - s * q), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (6,)
        torch.testing.assert_close(ours.double(), expected, atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_timestep_is_clean(kind):
    """At the clean timestep a is 1 and s is 0: noise changes nothing."""
    process, latents = PROCESSES[kind], randn(0)
    clean = torch.full((6,), process.clean_timestep)
    assert process.coefficients(clean).a.eq(1).all() and process.coefficients(clean).s.eq(0).all()
    assert torch.equal(process.add_noise(latents, randn(1), clean), latents)
    assert torch.equal(process.split(randn(2), latents, clean)[0], latents)


# ---- What diffusers has ----


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_noising_is_that_of_diffusers_ddpm(kind):
    """x_t and the targets are those of `DDPMScheduler`, to rounding."""
    process, timesteps, latents, noise = PROCESSES[kind], TIMESTEPS[kind], randn(0), randn(1)
    noisy_latents = process.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy_latents, SCHEDULER.add_noise(latents, noise, timesteps), atol=1e-6, rtol=0)
    expected = noise if kind == "noise" else SCHEDULER.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(process.target(latents, noise, timesteps), expected, atol=1e-6, rtol=0)


def test_noising_is_that_of_diffusers_flow_matching():
    """x_t is that of `FlowMatchEulerDiscreteScheduler` at its own timesteps, and the target is eps - x_0."""
    latents, noise = randn(0), randn(1)
    scheduler = copy.deepcopy(FLOW_SCHEDULER)
    timesteps = scheduler.timesteps[[0, 1, 250, 500, 998, 999]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(RectifiedFlow().add_noise(latents, noise, timesteps), expected, atol=1e-6, rtol=0)
    assert torch.equal(RectifiedFlow().target(latents, noise, timesteps), noise - latents)


# ---- Clean latents and noise of a prediction ----


@pytest.mark.parametrize("kind", KINDS)
def test_split_undoes_the_mixtures(kind):
    """From x_t and the target, `split` gives x_0 and eps again, and `explaining_noise` eps from x_t and x_0."""
    process, timesteps, latents, noise = PROCESSES[kind], TIMESTEPS[kind], randn(0), randn(1)
    noisy_latents, target = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    clean, found = process.split(target, noisy_latents, timesteps)
    # a_t is 0.068 at the deep end, which magnifies the rounding of x_t
    torch.testing.assert_close(clean, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, noise, atol=1e-5, rtol=1e-5)
    explaining = process.explaining_noise(latents, noisy_latents, timesteps)
    # s_t is 0.0005 at the shallow end of the flow: rounding of x_t over s_t
    magnified = 3e-7 / column(process.coefficients(timesteps).s)
    assert ((explaining - noise).abs() <= 1e-5 + magnified * latents.abs().clamp(min=1)).all()


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_an_inverse_step_is_that_of_diffusers(kind):
    """Splitting at one level and mixing at the next is a step of `DDIMInverseScheduler`."""
    process = PROCESSES[kind]
    prediction_type = {"noise": "epsilon", "velocity": "v_prediction"}[kind]
    scheduler = DDIMInverseScheduler.from_config(
        SCHEDULER.config,
        prediction_type=prediction_type,
        set_alpha_to_one=True,
        steps_offset=37,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    latents, prediction = randn(0), randn(1)
    for t_from, t_to in zip([-1, *scheduler.timesteps.tolist()], scheduler.timesteps.tolist()):
        levels = torch.full((6,), t_from), torch.full((6,), t_to)
        moved = process.add_noise(*process.split(prediction, latents, levels[0]), levels[1])
        expected = scheduler.step(prediction, t_to, latents).prev_sample
        torch.testing.assert_close(moved, expected, atol=2e-6, rtol=1e-5)


def test_an_inverse_step_of_a_flow_is_eulers():
    """Splitting at sigma and mixing at sigma' is x + (sigma' - sigma) v, as the scheduler steps the other way."""
    process, latents, prediction = RectifiedFlow(), randn(0), randn(1)
    scheduler = copy.deepcopy(FLOW_SCHEDULER)
    scheduler.set_timesteps(10)
    for index in range(9):
        more, less = scheduler.timesteps[index], scheduler.timesteps[index + 1]
        for t_from, t_to in ((less, more), (more, less)):
            moved = process.add_noise(*process.split(prediction, latents, t_from.expand(6)), t_to.expand(6))
            expected = latents + (t_to - t_from) / 1000 * prediction
            torch.testing.assert_close(moved, expected, atol=2e-6, rtol=1e-5)
        expected = scheduler.step(prediction, more, latents).prev_sample
        torch.testing.assert_close(moved, expected, atol=2e-6, rtol=1e-5)


def test_an_inversion_of_a_flow_is_eulers_walk():
    """Every latent walks its own levels, from clean, and the model is called with the level that a step leads to."""
    latents, velocity, timesteps = randn(0), randn(1), TIMESTEPS["flow"]
    called = []

    def predict(x, t, rows):
        called.append((t.tolist(), rows.tolist()))
        return velocity[rows] * column(t) / 1000

    arrived = invert_latents(predict, latents, timesteps, RectifiedFlow(), 10)
    for row, timestep in enumerate(timesteps.tolist()):
        levels = RectifiedFlow().inversion_timesteps(timestep, 10)
        assert [t for ts, rows in called for t, r in zip(ts, rows) if r == row] == pytest.approx(levels)
        integral = sum((to - since) * to / 1e6 for since, to in zip([0, *levels], levels))
        torch.testing.assert_close(arrived[row], latents[row] + integral * velocity[row], atol=5e-6, rtol=1e-5)


def test_a_flow_is_inverted_at_whole_timesteps_too():
    """The timesteps of an evaluation are whole numbers: their inversion is that of the same real ones."""
    latents, timesteps = randn(0), torch.tensor(RectifiedFlow().evaluation_timesteps(6, SIZE))

    def predict(x, t, rows):
        return x * column(t) / 1000

    whole, real = (invert_latents(predict, latents, t, RectifiedFlow(), 7) for t in (timesteps, timesteps.float()))
    assert torch.equal(whole, real)


# ---- What weights are made of ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_signal_to_noise_ratio(kind):
    """abar / (1 - abar), or ((1 - sigma) / sigma)^2."""
    timesteps = TIMESTEPS[kind]
    if kind == "flow":
        expected = ((1000 - timesteps.double()) / timesteps.double()).square()
    else:
        expected = (ALPHAS_CUMPROD.double() / (1 - ALPHAS_CUMPROD.double()))[timesteps]
    torch.testing.assert_close(PROCESSES[kind].snr(timesteps).double(), expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_noise_per_error_of_the_prediction(kind):
    """1, a^2 and (1 - sigma)^2: by how much the noise of a perturbed prediction is off, at the same x_t."""
    process, timesteps, latents, noise = PROCESSES[kind], TIMESTEPS[kind], randn(0), randn(1)
    noisy_latents, target = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    perturbation = randn(2)
    _, before = process.split(target.double().float(), noisy_latents, timesteps)
    _, after = process.split(target + perturbation, noisy_latents, timesteps)
    measured = (after - before).square().flatten(1).mean(dim=1) / perturbation.square().flatten(1).mean(dim=1)
    a = process.coefficients(timesteps).a
    expected = torch.ones(6) if kind == "noise" else a.square()
    torch.testing.assert_close(process.noise_errors_per_error(timesteps), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(measured, expected, atol=1e-5, rtol=1e-4)


def test_errors_of_the_noise_without_signal():
    """Where no signal is left, a noise model's errors are those of the noise still, and a velocity says nothing of it."""
    alphas_cumprod, last = torch.tensor([0.9, 0.5, 0.0]), torch.tensor([2])
    assert DiscreteProcess(alphas_cumprod, "epsilon").noise_errors_per_error(last).tolist() == [1]
    assert DiscreteProcess(alphas_cumprod, "v_prediction").noise_errors_per_error(last).tolist() == [0]
    assert RectifiedFlow().noise_errors_per_error(torch.tensor([1000.0])).tolist() == [0]


def test_the_posterior_variance_is_ddpms():
    """Between neighbouring timesteps it is what `DDPMScheduler` adds, and from clean latents 0."""
    scheduler = copy.deepcopy(SCHEDULER)
    scheduler.set_timesteps(1000)
    more = torch.tensor([1, 2, 250, 500, 998, 999])
    expected = torch.stack([scheduler._get_variance(t) for t in more])
    for kind in ("noise", "velocity"):
        # 1 - abar is 0.00085 at the shallow end: float32 leaves four digits of the variance
        variance = PROCESSES[kind].posterior_variance(more - 1, more)
        torch.testing.assert_close(variance, expected, atol=1e-8, rtol=5e-4)
        assert PROCESSES[kind].posterior_variance(torch.tensor([-1]), torch.tensor([500])).item() == 0
    assert RectifiedFlow().posterior_variance(torch.tensor([0.0]), torch.tensor([500.0])).item() == 0


def test_the_posterior_variance_of_a_flow():
    """Between sigmas 0.2 and 0.6: (0.2 / 0.6)^2 (0.36 - (0.4 / 0.8)^2 0.04) = 0.35 / 9."""
    variance = RectifiedFlow().posterior_variance(torch.tensor([200.0]), torch.tensor([600.0]))
    assert variance.item() == pytest.approx(0.35 / 9, abs=1e-7)


# ---- Timesteps ----


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_keyed(kind):
    """A row's timestep is the same alone, in a batch and in another order, and the global generator has no part in it."""
    process = PROCESSES[kind]
    state = torch.get_rng_state()
    batch = process.sample_timesteps(keys(20), SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.shape == (20,) and batch.dtype == (torch.float32 if kind == "flow" else torch.int64)
    assert len(set(batch.tolist())) > 15
    assert torch.equal(process.sample_timesteps(keys(20)[::-1], SIZE), batch.flip(0))
    assert [process.sample_timesteps([key], SIZE).item() for key in keys(20)] == batch.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep_range", [None, [200, 600]])
def test_timesteps_are_uniform_over_their_range(kind, timestep_range):
    """Twenty equal shares of the range are hit equally often, as Pearson's chi-squared says, to five standard deviations."""
    process = copy.copy(PROCESSES[kind])
    process.restrict(timestep_range)
    low, high = process.timestep_range
    timesteps = process.sample_timesteps(keys(6000), SIZE)
    assert timesteps.min() >= low and timesteps.max() <= high
    if kind != "flow":
        assert timesteps.max() < high
        timesteps = timesteps + 0.5
    assert chi_squared(timesteps, (timesteps - low) / (high - low)) < 5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timestep_range", [None, [200, 600]])
def test_density_and_shift_of_a_flow(shift, timestep_range):
    """
    sigma is logit-normal before the shift, s u / (1 + (s - 1) u) after it: logit(sigma) is normal about log(s), cut to the
    range. Both are diffusers' own: its density, with a generator, and the shift of its scheduler's schedule.
    """

    def density(num: int, generator: torch.Generator) -> torch.Tensor:
        return compute_density_for_timestep_sampling(
            "logit_normal", batch_size=num, logit_mean=0.0, logit_std=1.0, generator=generator
        )

    def shifted(u: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return shift * u / (1 + (shift - 1) * u)

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    plain = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    torch.testing.assert_close(shifted(plain.sigmas, SIZE), scheduler.sigmas, atol=1e-6, rtol=1e-6)

    process = RectifiedFlow(1000, density, shifted)
    process.restrict(timestep_range)
    timesteps = process.sample_timesteps(keys(6000), SIZE)
    assert torch.equal(process.sample_timesteps(keys(3), SIZE), timesteps[:3])

    def cdf(sigma: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr(torch.logit(sigma.double()) - torch.tensor(shift).double().log())

    low, high = (cdf(torch.tensor(bound / 1000)) for bound in process.timestep_range)
    assert chi_squared(timesteps, (cdf(timesteps / 1000) - low) / (high - low)) < 5
    uniform = (timesteps - process.timestep_range[0]) / (process.timestep_range[1] - process.timestep_range[0])
    assert chi_squared(timesteps, uniform) > 5, "the density is not uniform"


def test_a_flow_never_starts_without_noise():
    """A density that gives 0 is asked again: no noise explains clean latents."""
    numbers = iter([0.0, 0.0, 0.25])
    process = RectifiedFlow(1000, density=lambda num, generator: torch.tensor([next(numbers)]))
    assert process.sample_timesteps(keys(1), SIZE).tolist() == [250]


@pytest.mark.parametrize("kind", KINDS)
def test_restrict_refuses_what_is_not_there(kind):
    """A range that is empty, reversed or leaves the process is a ValueError that names it and what there is."""
    process = copy.copy(PROCESSES[kind])
    for timestep_range in ([-1, 10], [0, 1001], [5, 5], [600, 200]):
        with pytest.raises(ValueError, match="`timestep_range` is .* has the timesteps 0 to 999 only") as error:
            process.restrict(timestep_range)
        assert str(timestep_range) in str(error.value)
    assert process.timestep_range == (0, 1000), "a range that was refused was taken"
    process.restrict([999, 1000])
    assert set(process.evaluation_timesteps(2, SIZE)) <= {999, 1000}
    process.restrict(None)
    assert process.timestep_range == (0, 1000)


@pytest.mark.parametrize("timestep_range", [None, [200, 600]])
def test_an_evaluation_takes_quantiles_of_what_is_sampled(timestep_range):
    """Of 20,000 sampled timesteps, each share between two of them holds as many; whole numbers, so that keys can hold them."""
    process = RectifiedFlow(
        density=lambda num, generator: torch.sigmoid(torch.randn(num, generator=generator)),
        shift=lambda u, size: size[0] * u / (1 + (size[0] - 1) * u),
    )
    process.restrict(timestep_range)
    levels = process.evaluation_timesteps(4, (3, 3))
    assert levels == process.evaluation_timesteps(4, (3, 3)) and all(type(level) is int for level in levels)
    assert levels != process.evaluation_timesteps(4, (2, 2)), "the shift depends on the size"
    sampled = process.sample_timesteps(keys(6000), (3, 3))
    below = torch.tensor([(sampled < level).float().mean() for level in levels])
    torch.testing.assert_close(below, torch.tensor([0.125, 0.375, 0.625, 0.875]), atol=0.03, rtol=0)


def test_an_evaluation_needs_timesteps_in_its_range():
    """A range that the density never reaches is an error that names it."""
    process = RectifiedFlow(density=lambda num, generator: torch.full((num,), 0.5))
    process.restrict([0, 100])
    with pytest.raises(ValueError, match=r"`timestep_range=\[0, 100\]`"):
        process.evaluation_timesteps(4, SIZE)


# ---- Inversion ----


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50])
def test_levels_of_an_inversion(num_steps):
    """They end at the timestep, lie a stride apart, start within a stride of clean latents, and are at most the steps."""
    for process, timesteps in (
        (PROCESSES["noise"], [0, 1, 99, 100, 437, 999]),
        (PROCESSES["flow"], [0.25, 1.0, 99.5, 100.0, 100.5, 500.0, 999.75, 1000.0]),
    ):
        stride = 1000 / num_steps if process is PROCESSES["flow"] else -(-1000 // num_steps)
        for timestep in timesteps:
            levels = process.inversion_timesteps(timestep, num_steps)
            assert levels[-1] == timestep and 1 <= len(levels) <= num_steps
            assert [to - since for since, to in zip(levels, levels[1:])] == pytest.approx([stride] * (len(levels) - 1))
            assert process.clean_timestep < levels[0] <= stride + 1e-9
            assert all(type(level) is type(timestep) for level in levels)


# ---- Precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_float64(kind, dtype):
    """Whatever the precision that goes in, float32 comes out; a table in float64 too."""
    process: Process = PROCESSES[kind]
    if kind != "flow":
        prediction_type = {"noise": "epsilon", "velocity": "v_prediction"}[kind]
        process = DiscreteProcess(ALPHAS_CUMPROD.double(), prediction_type)
    timesteps, latents, noise = TIMESTEPS[kind], randn(0).to(dtype), randn(1).to(dtype)
    if kind == "flow":
        timesteps = timesteps.to(dtype)
    results = [
        *process.coefficients(timesteps),
        process.add_noise(latents, noise, timesteps),
        process.target(latents, noise, timesteps),
        process.explaining_noise(latents, noise, timesteps),
        *process.split(noise, latents, timesteps),
        process.snr(timesteps),
        process.noise_errors_per_error(timesteps),
        process.posterior_variance(timesteps[:-1], timesteps[1:]),
    ]
    assert {result.dtype for result in results} == {torch.float32}


def test_descriptions_differ_where_the_processes_do():
    """Kind, schedule, number of timesteps, density and shift are in it, as JSON; the range of the timesteps is not."""
    others = [
        RectifiedFlow(500),
        RectifiedFlow(shift=lambda u, size: 3 * u / (1 + 2 * u)),
        RectifiedFlow(density=lambda num, generator: torch.sigmoid(torch.randn(num, generator=generator))),
        DiscreteProcess(ALPHAS_CUMPROD[:500], "epsilon"),
    ]
    descriptions = [process.describe() for process in (*PROCESSES.values(), *others)]
    assert json.loads(json.dumps(descriptions)) == descriptions
    assert RectifiedFlow().describe() == PROCESSES["flow"].describe()
    assert all(a != b for index, a in enumerate(descriptions) for b in descriptions[:index])
    restricted = DiscreteProcess(ALPHAS_CUMPROD, "epsilon")
    restricted.restrict([3, 7])
    assert restricted.describe() == PROCESSES["noise"].describe()
