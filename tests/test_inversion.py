# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import inspect

import pytest
import torch
from diffusers import DDIMInverseScheduler

from tests import tiny
from trl_diffusion.inversion import invert_latents
from trl_diffusion.process import DiscreteProcess
from trl_diffusion.randomness import keyed_noise


TIMESTEPS = [0, 1, 50, 99, 100, 437, 900, 901, 999]
ALPHAS_CUMPROD = tiny.scheduler().alphas_cumprod
PROCESSES = {kind: DiscreteProcess(ALPHAS_CUMPROD, kind) for kind in ("epsilon", "v_prediction")}
PROCESS = PROCESSES["epsilon"]


def clean(batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Model:
    """A tiny UNet with a prompt for each sample, which notes what it is asked."""

    def __init__(self, prediction_type: str = "epsilon", batch_size: int = len(TIMESTEPS)):
        self.unet = tiny.sd_pipeline(prediction_type).unet.eval()
        self.prompt_embeds = torch.randn(batch_size, 12, 16, generator=torch.Generator().manual_seed(1))
        self.calls = []

    def __call__(self, latents, timesteps, rows):
        self.calls.append((timesteps.tolist(), rows.tolist()))
        return self.unet(latents, timesteps, self.prompt_embeds[rows]).sample


def invert(model, latents, timesteps, prediction_type="epsilon", num_steps=10, **kwargs) -> torch.Tensor:
    return invert_latents(model, latents, torch.tensor(timesteps), PROCESSES[prediction_type], num_steps, **kwargs)


# ---- The walk ----


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 50, 1000])
def test_every_walk_arrives_at_its_timestep_in_time(num_steps):
    """The last timestep is the sampled one, no step is longer than the stride, and no walk takes more than the steps."""
    stride = -(-1000 // num_steps)
    for timestep in range(1000):
        walk = PROCESS.inversion_timesteps(timestep, num_steps)
        assert walk[-1] == timestep and len(walk) <= num_steps
        assert 0 <= walk[0] < stride
        assert all(later - earlier == stride for earlier, later in zip(walk, walk[1:]))
    assert len(PROCESS.inversion_timesteps(999, num_steps)) == -(-1000 // stride)


def test_all_timesteps_that_the_model_is_asked_at_exist():
    """No call before the first timestep and none after the last, for any sampled timestep (an earlier script asked at -99)."""
    asked = {timestep for sampled in range(1000) for timestep in PROCESS.inversion_timesteps(sampled, 10)}
    assert asked == set(range(1000))


# ---- Parity ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_a_walk_is_that_of_diffusers(timestep, prediction_type):
    """diffusers' inverse scheduler, with the offset that makes it pass the timestep, makes the same walk."""
    model = Model(prediction_type, 1)
    ours = invert(model, clean(1), [timestep], prediction_type)

    config = tiny.scheduler(prediction_type=prediction_type).config
    scheduler = DDIMInverseScheduler.from_config(
        config, set_alpha_to_one=True, steps_offset=timestep % 100, timestep_spacing="leading"
    )
    scheduler.set_timesteps(10)
    theirs = clean(1)
    for t in scheduler.timesteps[scheduler.timesteps <= timestep]:
        with torch.no_grad():
            model_pred = model.unet(theirs, t, model.prompt_embeds).sample
        theirs = scheduler.step(model_pred, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    assert (ours - clean(1)).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_back_undoes_a_step(prediction_type):
    """With one and the same prediction, from a level to another and back is the identity."""
    latents, model_pred = clean(2), torch.randn(2, 4, 8, 8)
    levels = torch.tensor([0.9, 0.5, 0.4, 0.1])  # from the first two to the last two
    process, low, high = DiscreteProcess(levels, prediction_type), torch.tensor([0, 1]), torch.tensor([2, 3])

    def step(process, x, pred, t_from, t_to):
        return process.add_noise(*process.split(pred, x, t_from), t_to)

    there = step(process, latents, model_pred, low, high)
    if prediction_type == "v_prediction":  # a velocity means another noise at another level: go by the noise
        a = levels[low].view(2, 1, 1, 1)
        noise = a.sqrt() * model_pred + (1 - a).sqrt() * latents
        back = step(DiscreteProcess(levels, "epsilon"), there, noise, high, low)
    else:
        back = step(process, there, model_pred, high, low)
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-5)


def test_a_model_that_knows_the_noise_arrives_where_the_forward_process_does():
    """If the prediction is the true noise at every step, inversion is `a_t x_0 + s_t eps`, whatever the depth."""
    noise, timesteps = torch.randn(len(TIMESTEPS), 4, 8, 8), torch.tensor(TIMESTEPS)
    latents = clean(len(TIMESTEPS))
    arrived = invert(lambda x, t, rows: noise[rows], latents, TIMESTEPS)
    torch.testing.assert_close(arrived, PROCESS.add_noise(latents, noise, timesteps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noise_explains_the_arrival(prediction_type):
    """Clean latents and that noise give the arrival point again, at the sampled timestep and not at one near it."""
    latents, timesteps = clean(len(TIMESTEPS)), torch.tensor(TIMESTEPS)
    arrived = invert(Model(prediction_type), latents, TIMESTEPS, prediction_type)
    noise = PROCESS.explaining_noise(latents, arrived, timesteps)
    torch.testing.assert_close(PROCESS.add_noise(latents, noise, timesteps), arrived, atol=1e-5, rtol=1e-5)
    first_step = ALPHAS_CUMPROD[timesteps[2]]
    shorter = invert(Model(prediction_type), latents, [timestep // 2 for timestep in TIMESTEPS], prediction_type)
    assert first_step < 1 and (shorter - arrived)[2:].abs().flatten(1).max(dim=1).values.min() > 1e-3


# ---- The three faults of the published script ----


def test_every_timestep_can_be_sampled():
    """For each of the 1000 timesteps the walk is made: nothing is looked up behind the end of the schedule."""
    latents = torch.zeros(1000, 1, 1, 1)
    arrived = invert(lambda x, t, rows: torch.ones_like(x), latents, list(range(1000)))
    torch.testing.assert_close(arrived.flatten(), (1 - ALPHAS_CUMPROD).sqrt())


def test_the_first_call_is_on_the_schedule():
    """The model is asked at timesteps of the schedule only, the first of a walk included."""
    model = Model()
    invert(model, clean(len(TIMESTEPS)), TIMESTEPS)
    asked = [timestep for timesteps, _ in model.calls for timestep in timesteps]
    assert min(asked) == 0 and max(asked) == 999


@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_each_sample_has_its_own_depth(eta):
    """A sample of a batch ends where it ends alone: the first of a batch does not decide for the others."""
    keys = [("key", row) for row in range(len(TIMESTEPS))]
    together = invert(Model(), clean(len(TIMESTEPS)), TIMESTEPS, eta=eta, keys=keys)
    for row, timestep in enumerate(TIMESTEPS):
        model = Model()
        model.prompt_embeds = model.prompt_embeds[row : row + 1]
        alone = invert(model, clean(len(TIMESTEPS))[row : row + 1], [timestep], eta=eta, keys=keys[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-6, rtol=1e-5)


def test_samples_that_have_arrived_are_not_computed():
    """The forwards hold the samples that are underway and no others: 1, 1, 1, 1, 2, 5, 10, 10, 10 of at most 10 steps."""
    model = Model()
    invert(model, clean(len(TIMESTEPS)), TIMESTEPS)
    calls_of = [sum(row in rows for _, rows in model.calls) for row in range(len(TIMESTEPS))]
    assert calls_of == [timestep // 100 + 1 for timestep in TIMESTEPS]
    assert len(model.calls) == 10
    last_asked = {row: timestep for timesteps, rows in model.calls for timestep, row in zip(timesteps, rows)}
    assert [last_asked[row] for row in range(len(TIMESTEPS))] == TIMESTEPS


# ---- The random term ----


def test_the_random_term_is_ddpms_deviation_times_eta():
    """eta z sqrt((1 - a_u) / (1 - a_v) (1 - a_v / a_u)) after the step from u to v, and none after the first, from clean."""
    keys, zeros = [("key",)], torch.zeros(1, 4, 8, 8)
    arrived = invert(lambda x, t, rows: torch.zeros_like(x), zeros, [150], eta=0.1, keys=keys)
    low, high = ALPHAS_CUMPROD[50], ALPHAS_CUMPROD[150]
    deviation = ((1 - low) / (1 - high) * (1 - high / low)).sqrt()
    expected = 0.1 * deviation * keyed_noise([("key", 150)], (4, 8, 8))
    torch.testing.assert_close(arrived, expected, atol=1e-7, rtol=1e-5)
    scheduler = tiny.scheduler()
    torch.testing.assert_close(deviation**2, scheduler._get_variance(150, 50))
    assert invert(lambda x, t, rows: torch.zeros_like(x), zeros, [50], eta=0.1, keys=keys).abs().max() == 0


def test_without_eta_nothing_is_random():
    """Twice the same latents, and other keys change nothing."""
    first = invert(Model(), clean(9), TIMESTEPS)
    assert torch.equal(first, invert(Model(), clean(9), TIMESTEPS, keys=[("other",)] * 9))
    assert not torch.equal(first, invert(Model(), clean(9), TIMESTEPS, eta=0.1, keys=[("other",)] * 9))


# ---- What it leaves alone ----


def test_no_gradient_no_change_and_float32():
    """The latents that are given stay as they are; the result is float32 without gradient, half precision predictions or not."""
    latents, before = clean(2).requires_grad_(), clean(2)
    arrived = invert(lambda x, t, rows: torch.ones_like(x, dtype=torch.bfloat16), latents, [10, 500])
    assert torch.equal(latents, before)
    assert arrived.dtype == torch.float32 and not arrived.requires_grad


def test_other_predictions_are_refused():
    """A model that predicts the sample is not silently taken for one that predicts the noise."""
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        DiscreteProcess(ALPHAS_CUMPROD, "sample")


def test_velocity_with_a_terminal_signal_of_zero():
    """With a schedule rescaled to zero signal at its end, arrival there is finite for velocity models."""
    alphas_cumprod = tiny.scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).alphas_cumprod.clone()
    alphas_cumprod[-1] = 0
    process, timesteps = DiscreteProcess(alphas_cumprod, "v_prediction"), torch.tensor([999])
    arrived = invert_latents(lambda x, t, rows: torch.ones_like(x), clean(1), timesteps, process, 10)
    noise = process.explaining_noise(clean(1), arrived, timesteps)
    assert arrived.isfinite().all() and torch.equal(noise, arrived)


def test_the_first_argument_of_inversion_is_a_plain_callable():
    """Backbones are not known here: any function of latents, timesteps and rows will do."""
    assert list(inspect.signature(invert_latents).parameters)[0] == "predict"
