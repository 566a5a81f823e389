# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import DDPMScheduler

from trl_diffusion.losses import diffusion_dpo_loss
from trl_diffusion.noising import per_sample_errors, timestep_weights
from trl_diffusion.process import DiscreteProcess, RectifiedFlow
from trl_diffusion.randomness import keyed_generator, keyed_noise


SHAPE = (4, 8, 8)
SIZE = SHAPE[1:]


def keys(num: int, seed: int = 0, step: int = 0) -> list[tuple]:
    return [(seed, step, f"row-{index}") for index in range(num)]


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def process_of(scheduler: DDPMScheduler, prediction_type: str = "epsilon", timestep_range=None) -> DiscreteProcess:
    process = DiscreteProcess(scheduler.alphas_cumprod, prediction_type)
    process.restrict(timestep_range)
    return process


@pytest.fixture
def sample():
    """Latents, noise and timesteps that hold both ends of the schedule."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, *SHAPE, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 5), (5,)])
def test_noise_does_not_depend_on_the_batch(shape):
    """A row's noise is the same alone, in a batch and in another order, also where rows are no multiple of 16 numbers."""
    batch = keyed_noise(keys(5), shape)
    assert batch.shape == (5, *shape)
    assert batch.dtype == torch.float32
    assert torch.equal(keyed_noise(keys(5)[::-1], shape), batch.flip(0))
    for index, key in enumerate(keys(5)):
        assert torch.equal(keyed_noise([key], shape)[0], batch[index])


def test_timesteps_do_not_depend_on_the_batch(scheduler):
    """A row's timestep is the same alone, in a batch and in another order."""
    sample_timesteps = process_of(scheduler).sample_timesteps
    batch = sample_timesteps(keys(20), SIZE)
    assert batch.shape == (20,)
    assert batch.dtype == torch.int64
    assert torch.equal(sample_timesteps(keys(20)[::-1], SIZE), batch.flip(0))
    assert [sample_timesteps([key], SIZE).item() for key in keys(20)] == batch.tolist()


def test_every_part_of_the_key_matters():
    """Another seed, step, row, type of a part or split of a string gives another draw."""
    different = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), ("0", 0, "a"), (0, 0, "a", ""), (0, "0, a")]
    noise = keyed_noise([*different, ("ab", "c"), ("a", "bc")], (16,))
    assert len({tuple(row) for row in noise.tolist()}) == len(different) + 2


def test_draws_are_the_same_in_every_process():
    """The generator's seed is a recorded number: no salt of the process and no version changes a run."""
    assert keyed_generator(42, 7, "row-3").initial_seed() == 10932015755257227554


def test_noise_is_standard_normal():
    """Over a million numbers mean, standard deviation and kurtosis are 0, 1 and 3, to five standard errors."""
    noise = keyed_noise(keys(4000), SHAPE)
    standard_error = noise.numel() ** -0.5
    assert abs(noise.mean().item()) < 5 * standard_error
    assert abs(noise.std().item() - 1) < 5 * standard_error / 2**0.5
    assert abs(noise.pow(4).mean().item() - 3) < 5 * standard_error * 96**0.5


def test_noise_of_different_keys_is_uncorrelated():
    """Neighbouring rows' noise has correlation 0, to five standard errors."""
    noise = keyed_noise(keys(1000), (256,))
    correlation = (noise[1:] * noise[:-1]).mean().item()
    assert abs(correlation) < 5 * noise[1:].numel() ** -0.5


def test_global_generator_is_neither_read_nor_moved(scheduler):
    """Draws leave torch's global state as it was, and do not depend on it."""
    sample_timesteps = process_of(scheduler).sample_timesteps
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = keyed_noise(keys(2), SHAPE), sample_timesteps(keys(2), SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = keyed_noise(keys(2), SHAPE), sample_timesteps(keys(2), SIZE)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_timesteps_include_low_and_exclude_high(scheduler):
    """Timesteps in [3, 7) are 3, 4, 5 and 6, and all of them occur."""
    assert set(process_of(scheduler, timestep_range=[3, 7]).sample_timesteps(keys(300), SIZE).tolist()) == {3, 4, 5, 6}
    assert process_of(scheduler, timestep_range=[999, 1000]).sample_timesteps(keys(3), SIZE).tolist() == [999] * 3


def test_timesteps_are_uniform(scheduler):
    """Ten equal parts of the range are hit 500 times each by 5000 keys, to five standard deviations."""
    counts = torch.bincount(process_of(scheduler).sample_timesteps(keys(5000), SIZE) // 100, minlength=10)
    assert counts.sum() == 5000
    assert (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize(
    ("low", "high", "num", "expected"),
    [
        (0, 1000, 8, [62, 187, 312, 437, 562, 687, 812, 937]),
        (0, 1000, 1, [500]),
        (200, 600, 2, [300, 500]),
        (100, 104, 4, [100, 101, 102, 103]),
        (999, 1000, 3, [999, 999, 999]),
    ],
)
def test_evaluation_timesteps_by_hand(scheduler, low, high, num, expected):
    """Timesteps of an evaluation are the middles of equal shares: 62.5, 187.5, ... cut to integers for 8 of 1000."""
    assert process_of(scheduler, timestep_range=[low, high]).evaluation_timesteps(num, SIZE) == expected


def test_add_noise_equals_diffusers(scheduler, sample):
    """x_t is that of diffusers' DDPM scheduler on the schedule of Stable Diffusion 1.5."""
    latents, noise, timesteps = sample
    expected = scheduler.add_noise(latents, noise, timesteps)
    noisy_latents = process_of(scheduler).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy_latents, expected, atol=1e-6, rtol=0)


def test_velocity_equals_diffusers(scheduler, sample):
    """The v-prediction target is that of diffusers' DDPM scheduler."""
    latents, noise, timesteps = sample
    target = process_of(scheduler, "v_prediction").target(latents, noise, timesteps)
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, timesteps), atol=1e-6, rtol=0)


def test_clean_latents_follow_from_noised_latents_and_target(scheduler, sample):
    """x_0 = (x_t - s_t eps) / a_t, and x_0 = a_t x_t - s_t v, at every depth."""
    latents, noise, timesteps = sample
    signal = scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    noisy_latents = process_of(scheduler).add_noise(latents, noise, timesteps)
    epsilon = process_of(scheduler, "epsilon").target(latents, noise, timesteps)
    velocity = process_of(scheduler, "v_prediction").target(latents, noise, timesteps)
    # a_t is 0.068 at the deep end, which magnifies the rounding of x_t
    torch.testing.assert_close(
        (noisy_latents - (1 - signal**2).sqrt() * epsilon) / signal, latents, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        signal * noisy_latents - (1 - signal**2).sqrt() * velocity, latents, atol=1e-5, rtol=1e-5
    )


def test_epsilon_target_is_the_noise(scheduler, sample):
    """The target of noise prediction is the noise itself."""
    latents, noise, timesteps = sample
    assert torch.equal(process_of(scheduler, "epsilon").target(latents, noise, timesteps), noise)


def test_forward_process_is_float32_for_bfloat16_latents(scheduler, sample):
    """Latents in bf16 give float32 results equal to those of the same latents in float32, under autocast as well."""
    latents, noise, timesteps = sample
    latents, process = latents.bfloat16(), process_of(scheduler, "v_prediction")
    with torch.autocast("cpu", torch.bfloat16):
        noisy_latents = process.add_noise(latents, noise, timesteps)
        target = process.target(latents, noise, timesteps)
    assert torch.equal(noisy_latents, process.add_noise(latents.float(), noise, timesteps))
    assert torch.equal(target, process.target(latents.float(), noise, timesteps))
    assert noisy_latents.dtype == target.dtype == torch.float32


def test_unknown_prediction_type_is_refused(scheduler):
    """A prediction type that is not supported is a ValueError that names it and those that are."""
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        DiscreteProcess(scheduler.alphas_cumprod, "sample")


def test_errors_by_hand():
    """Predictions 0 against targets 1, 3 and 2, 4 (two channels): (1 + 9 + 4 + 16) / 4 = 7.5."""
    target = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])
    assert per_sample_errors(torch.zeros_like(target), target).tolist() == [7.5]


def test_masks_weigh_positions():
    """
    Each sample has its own mask, shared by its channels. Squares 1, 9 | 4, 16 under the mask 2, 0 give (2 + 8) / 4 = 2.5; under
    the mask -1, 3 they give (-1 + 27 - 4 + 48) / 4 = 17.5. As many samples as channels, so that mixing them up shows.
    """
    target = torch.tensor([[[1.0, 3.0]], [[2.0, 4.0]]]).expand(2, 2, 1, 2)
    masks = torch.tensor([[[2.0, 0.0]], [[-1.0, 3.0]]])
    assert per_sample_errors(torch.zeros_like(target), target, masks).tolist() == [2.5, 17.5]


def test_mask_of_ones_changes_nothing():
    """A mask of ones gives exactly the unmasked errors."""
    model_pred, target = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    errors = per_sample_errors(model_pred, target)
    assert torch.equal(per_sample_errors(model_pred, target, torch.ones(3, 8, 8)), errors)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_tiny_difference_survives_bfloat16(autocast):
    """
    Of 256 predictions one is a single bf16 step below the reference's: 1 - 2^-8 instead of 1, against targets 0. The errors differ
    by (1 - (1 - 2^-8)^2) / 256 = 3.0458e-5, and 0.5 * 5000 times that is a margin of 0.07614; in bf16 it would be 0.
    """
    ref_pred = torch.ones(1, *SHAPE, dtype=torch.bfloat16)
    model_pred = ref_pred.clone()
    model_pred[0, 0, 0, 0] = 1 - 2**-8
    target = torch.zeros_like(ref_pred)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        errors, ref_errors = per_sample_errors(model_pred, target), per_sample_errors(ref_pred, target)
        losses, rewards, _ = diffusion_dpo_loss(errors, ref_errors, ref_errors, ref_errors, beta=5000)
    assert errors.dtype == losses.dtype == torch.float32
    # float32 rounds errors of about 1 to 6e-8, which beta magnifies to 1.5e-4
    assert rewards.item() == pytest.approx(2500 * (1 - (1 - 2**-8) ** 2) / 256, abs=2e-4)


def test_gradient_of_errors_reaches_a_bfloat16_prediction():
    """d mean((target - pred)^2) / d pred = 2 (pred - target) / n, in the prediction's own precision."""
    model_pred = torch.full((1, 1, 2, 2), 3.0, dtype=torch.bfloat16, requires_grad=True)
    per_sample_errors(model_pred, torch.ones(1, 1, 2, 2)).sum().backward()
    assert model_pred.grad.dtype == torch.bfloat16
    assert model_pred.grad.flatten().tolist() == [1.0] * 4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_timestep_weights_are_their_formulas_of_the_snr(prediction_type):
    """min(SNR, 5) / SNR and 1 / (1 + SNR) on errors of the noise, times SNR / (1 + SNR) on those of the velocity."""
    alphas_cumprod = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    process, timesteps = DiscreteProcess(alphas_cumprod, prediction_type), torch.arange(0, 1000, 37)
    snr = (alphas_cumprod / (1 - alphas_cumprod))[timesteps].double()
    on_velocity = snr / (1 + snr) if prediction_type == "v_prediction" else 1.0
    for weighting, on_noise in (("min_snr", snr.clamp(max=5) / snr), ("sigmoid", 1 / (1 + snr))):
        weights = timestep_weights(timesteps, process, weighting)
        assert weights.dtype == torch.float32 and weights.min() >= 0 and weights.max() <= 1
        torch.testing.assert_close(weights.double(), on_noise * on_velocity, atol=1e-5, rtol=1e-4)
    assert (timestep_weights(timesteps, process, "constant") == 1).all()


def test_timestep_weights_of_a_flow():
    """They are those of errors of the noise, with SNR = (1 - sigma)^2 / sigma^2, times (1 - sigma)^2."""
    timesteps = torch.linspace(1, 1000, 50)
    sigma = timesteps.double() / 1000
    snr = ((1 - sigma) / sigma).square()
    on_flow = (1 - sigma).square()
    for weighting, expected in (("min_snr", snr.clamp(max=5) * sigma.square()), ("sigmoid", on_flow / (1 + snr))):
        weights = timestep_weights(timesteps, RectifiedFlow(), weighting)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights[:-1].double(), expected[:-1], atol=1e-5, rtol=1e-4)
    assert (timestep_weights(timesteps, RectifiedFlow(), "constant") == 1).all()
    for weighting in ("constant", "min_snr", "sigmoid"):
        assert timestep_weights(torch.tensor([1e-3, 1000.0]), RectifiedFlow(), weighting).isfinite().all()


def test_timestep_weights_at_zero_terminal_snr():
    """Where no signal is left, weights are finite."""
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.0])
    for weighting in ("constant", "min_snr", "sigmoid"):
        for prediction_type in ("epsilon", "v_prediction"):
            process = DiscreteProcess(alphas_cumprod, prediction_type)
            weights = timestep_weights(torch.arange(3), process, weighting)
            assert weights.isfinite().all()
    with pytest.raises(ValueError, match="'constant', 'min_snr' or 'sigmoid'"):
        timestep_weights(torch.arange(3), process, "snr")


@pytest.mark.parametrize("shape", [(), (3,), (4, 5, 5), (16, 33, 31)])
def test_noise_is_that_of_torch_randn(shape):
    """Each row is `torch.randn` with the generator of its key, bit for bit, however few numbers it has."""
    expected = [torch.randn(shape, generator=keyed_generator(*key, "noise")) for key in keys(3)]
    assert torch.equal(keyed_noise(keys(3), shape), torch.stack(expected))
