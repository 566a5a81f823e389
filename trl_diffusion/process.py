# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Noise, velocity and rectified-flow models as one process.

A process mixes clean latents `x_0` with noise `eps`, and its model predicts another mixture of the two:

    x_t  = a x_0 + s eps          the noised latents
    pred = p eps + q x_0          the target of the model

| kind                                   | a            | s                | p | q  |
|----------------------------------------|--------------|------------------|---|----|
| noise (DDPM, arXiv:2006.11239)         | sqrt(abar_t) | sqrt(1 - abar_t) | 1 | 0  |
| velocity (arXiv:2202.00512)            | sqrt(abar_t) | sqrt(1 - abar_t) | a | -s |
| rectified flow (arXiv:2209.03003)      | 1 - sigma    | sigma            | 1 | -1 |

Everything below follows from these four numbers. All results are float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .randomness import keyed_generator


NUM_FOR_QUANTILES = 10_000


class Coefficients(NamedTuple):
    """
    The numbers `a`, `s`, `p` and `q` of some timesteps, and `determinant = a p - s q`, by which the two mixtures are solved for
    `x_0` and `eps`: float32 tensors of one shape.
    """

    a: torch.Tensor
    s: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    determinant: torch.Tensor


class Process(ABC):
    """
    How latents `x_0` are noised with `eps`, and what the model predicts:

        x_t  = a x_0 + s eps
        pred = p eps + q x_0

    The numbers are those of the kind of model: noise (arXiv:2006.11239), velocity (arXiv:2202.00512) or rectified flow
    (arXiv:2209.03003).

    Attributes:
        num_timesteps (`int`):
            Number of timesteps `T`. Timesteps increase with the noise.
        clean_timestep (`int` or `float`):
            The timestep that stands for clean latents: `a = 1`, `s = 0`.
        timestep_range (`tuple[int, int]`):
            The timesteps that are sampled, the upper end excluded.
    """

    num_timesteps: int
    clean_timestep: int | float
    timestep_range: tuple[int, int]

    @abstractmethod
    def coefficients(self, timesteps: torch.Tensor) -> Coefficients:
        """
        The coefficients of timesteps.

        Args:
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.

        Returns:
            [`process.Coefficients`], each of shape `(B,)`.
        """

    @abstractmethod
    def sample_timestep(self, generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
        """Samples one timestep of `timestep_range`, a tensor of shape `()`, for latents of the size `(h, w)`."""

    @abstractmethod
    def inversion_timesteps(self, timestep: int | float, num_steps: int) -> list[int | float]:
        """
        The timesteps that an inversion visits: the last is `timestep`, and the others lie a stride of `T / num_steps` apart.

        Args:
            timestep (`int` or `float`):
                The timestep at which the inversion ends.
            num_steps (`int`):
                Number of steps to the last timestep of the process; earlier ones take fewer.

        Returns:
            `list` of length 1 to `num_steps`: increasing timesteps.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the process depends on, as JSON: by this, caches and references are compared."""

    def restrict(self, timestep_range: list[int] | None) -> None:
        """
        Restricts the timesteps that are sampled.

        Args:
            timestep_range (`list[int]` or `None`):
                `[low, high]`, `high` excluded; `None` keeps all.

        Raises:
            `ValueError`: If the process has no such timesteps.
        """
        low, high = timestep_range or (0, self.num_timesteps)
        if not 0 <= low < high <= self.num_timesteps:
            raise ValueError(
                f"`timestep_range` is {timestep_range}, but this model has the timesteps 0 to {self.num_timesteps - 1} only."
            )
        self.timestep_range = (low, high)

    def sample_timesteps(self, keys: list[tuple], size: tuple[int, int]) -> torch.Tensor:
        """
        Samples a timestep for each key.

        Args:
            keys (`list[tuple]` of length `B`):
                One key for each row, see [`randomness.keyed_generator`].
            size (`tuple[int, int]`):
                Height and width of the latents.

        Returns:
            `torch.Tensor` of shape `(B,)`: timesteps, on the CPU.
        """
        return torch.stack([self.sample_timestep(keyed_generator(*key, "timestep"), size) for key in keys])

    def evaluation_timesteps(self, num: int, size: tuple[int, int]) -> list[int]:
        """
        Timesteps for an evaluation: quantiles of those that are sampled, each in the middle of its share.

        Args:
            num (`int`):
                Number of timesteps.
            size (`tuple[int, int]`):
                Height and width of the latents.

        Returns:
            `list[int]` of length `num`: increasing timesteps.
        """
        low, high = self.timestep_range
        return [low + int((high - low) * (k + 0.5) / num) for k in range(num)]

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Noised latents `x_t = a x_0 + s eps`.

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`):
                Clean latents `x_0`.
            noise (`torch.Tensor` of shape `(B, ...)`):
                Noise `eps`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: float32.
        """
        c = self._coefficients_like(latents, timesteps)
        return c.a * latents.float() + c.s * noise.float()

    def explaining_noise(
        self, latents: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """
        The noise that explains how clean latents became noised ones, `eps = (x_t - a x_0) / s`: the inverse of `add_noise`.

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`):
                Clean latents `x_0`.
            noisy_latents (`torch.Tensor` of shape `(B, ...)`):
                Noised latents `x_t`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: float32.
        """
        c = self._coefficients_like(latents, timesteps)
        return (noisy_latents.float() - c.a * latents.float()) / c.s

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        What the model should predict at `x_t`, `p eps + q x_0`.

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`):
                Clean latents `x_0`.
            noise (`torch.Tensor` of shape `(B, ...)`):
                Noise `eps`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: float32.
        """
        c = self._coefficients_like(latents, timesteps)
        return c.p * noise.float() + c.q * latents.float()

    def split(
        self, model_pred: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Splits noised latents into the clean latents and the noise that a prediction takes them to consist of: the two equations
        of the process, solved (ours, for every kind of model).

            x_0 = (p x_t - s pred) / (a p - s q)        eps = (a pred - q x_t) / (a p - s q)

        Args:
            model_pred (`torch.Tensor` of shape `(B, ...)`):
                The prediction.
            noisy_latents (`torch.Tensor` of shape `(B, ...)`):
                Noised latents `x_t`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                The timesteps that the latents are at.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, ...)`: `x_0` and `eps`, float32.
        """
        c = self._coefficients_like(noisy_latents, timesteps)
        model_pred, noisy_latents = model_pred.float(), noisy_latents.float()
        clean = (c.p * noisy_latents - c.s * model_pred) / c.determinant
        return clean, c.a / c.determinant * model_pred - c.q / c.determinant * noisy_latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The signal-to-noise ratio `a^2 / s^2` of timesteps `(B,)`: `(B,)`."""
        c = self.coefficients(timesteps)
        return c.a.square() / c.s.square()

    def noise_errors_per_error(self, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The squared error of the noise over the squared error of the prediction that it belongs to,
        `(a / (a p - s q))^2`: 1 for noise models, `a^2` for velocity models and `(1 - sigma)^2` for rectified flows.

        Args:
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        c = self.coefficients(timesteps)
        # Without q the determinant is a p, and a is 0 where no signal is left
        return torch.where(c.q == 0, 1 / c.p, c.a / c.determinant).square()

    def posterior_variance(self, from_timesteps: torch.Tensor, to_timesteps: torch.Tensor) -> torch.Tensor:
        """
        The variance of the ancestral step between two levels of noise (DDPM, arXiv:2006.11239, equation 7),
        `(s_from / s_to)^2 (s_to^2 - (a_to / a_from)^2 s_from^2)`, for `s_from < s_to`.

        Args:
            from_timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps of less noise.
            to_timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps of more noise.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        less, more = self.coefficients(from_timesteps), self.coefficients(to_timesteps)
        variance = more.s.square() - (more.a / less.a).square() * less.s.square()
        return (less.s / more.s).square() * variance.clamp(min=0)

    def _coefficients_like(self, values: torch.Tensor, timesteps: torch.Tensor) -> Coefficients:
        """Coefficients shaped to multiply tensors of the shape `(B, ...)`."""
        shape = (-1, *[1] * (values.ndim - 1))
        return Coefficients(*(value.view(shape) for value in self.coefficients(timesteps)))


class DiscreteProcess(Process):
    """
    The process of a noise or velocity model: `T` levels of noise, with `a^2 + s^2 = 1`.

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            `abar_t`, float32 (in float16 it is 7 % off near t = 0).
        prediction_type (`str`):
            `"epsilon"` for noise models, `"v_prediction"` for velocity models.

    Raises:
        `ValueError`: If `prediction_type` is something else.
    """

    clean_timestep = -1  # the last entry of the table

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"`prediction_type` must be 'epsilon' or 'v_prediction', got {prediction_type!r}.")
        alphas_cumprod = torch.cat([alphas_cumprod.float().cpu(), torch.ones(1)])
        a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        p, q, determinant = (one, zero, a) if prediction_type == "epsilon" else (a, -s, one)
        self.table = torch.stack([a, s, p, q, determinant])
        self.num_timesteps = len(alphas_cumprod) - 1
        self.restrict(None)

    def coefficients(self, timesteps: torch.Tensor) -> Coefficients:
        if self.table.device != timesteps.device:
            self.table = self.table.to(timesteps.device)
        return Coefficients(*self.table[:, timesteps])

    def sample_timestep(self, generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
        return torch.randint(*self.timestep_range, (), generator=generator)

    def inversion_timesteps(self, timestep: int, num_steps: int) -> list[int]:
        # Those of DDIMInverseScheduler with leading spacing and `steps_offset = timestep % stride`
        stride = -(-self.num_timesteps // num_steps)
        return list(range(timestep % stride, timestep + 1, stride))

    def describe(self) -> dict[str, Any]:
        return {"process": "discrete", "table": self.table.tolist()}


class RectifiedFlow(Process):
    """
    The process of a rectified flow: `x_t = (1 - sigma) x_0 + sigma eps` with `sigma = t / T` and real timesteps `t`.

    To sample `sigma`, a number in [0, 1] is sampled from a density (SD3, arXiv:2403.03206, section 3.1) and shifted towards the
    noise. Uniform numbers give the timesteps that the pipeline samples images with.

    Args:
        num_timesteps (`int`, *optional*, defaults to `1000`):
            The timestep of pure noise.
        density (`Callable`, *optional*):
            Samples numbers `(N,)` from `N` and a generator. Uniform if left out.
        shift (`Callable`, *optional*):
            From these numbers and the size `(h, w)` of the latents to `sigma` `(N,)`, as the pipeline shifts its schedule.
            None if left out.
    """

    clean_timestep = 0.0

    def __init__(
        self,
        num_timesteps: int = 1000,
        density: Callable[[int, torch.Generator], torch.Tensor] = lambda num, generator: torch.rand(
            num, generator=generator
        ),
        shift: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor] = lambda sigmas, size: sigmas,
    ):
        self.num_timesteps = num_timesteps
        self.density = density
        self.shift = shift
        self.restrict(None)

    def coefficients(self, timesteps: torch.Tensor) -> Coefficients:
        sigma = timesteps.float() / self.num_timesteps
        one = torch.ones_like(sigma)
        return Coefficients(1 - sigma, sigma, one, -one, one)

    def sample_timestep(self, generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
        while True:  # rejection: right for every density
            if len(timesteps := self._sample(1, generator, size)):
                return timesteps[0]

    def evaluation_timesteps(self, num: int, size: tuple[int, int]) -> list[int]:
        sampled = self._sample(NUM_FOR_QUANTILES, keyed_generator("quantiles"), size)
        if not len(sampled):
            raise ValueError(
                f"Of {NUM_FOR_QUANTILES:,} sampled timesteps none is in `timestep_range={list(self.timestep_range)}`. "
                "Widen it, or choose another `timestep_density`."
            )
        quantiles = torch.quantile(sampled, (torch.arange(num) + 0.5) / num)
        return [max(1, round(timestep)) for timestep in quantiles.tolist()]

    def _sample(self, num: int, generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
        """Samples timesteps and keeps those in `timestep_range`; none is 0, as no noise explains clean latents."""
        timesteps = self.num_timesteps * self.shift(self.density(num, generator), size)
        low, high = self.timestep_range
        return timesteps[(low <= timesteps) & (timesteps <= high) & (timesteps > 0)]

    def inversion_timesteps(self, timestep: float, num_steps: int) -> list[float]:
        stride = self.num_timesteps / num_steps
        steps_before = math.ceil(timestep * num_steps / self.num_timesteps) - 1
        return [timestep - stride * (steps_before - step) for step in range(steps_before + 1)]

    def describe(self) -> dict[str, Any]:
        # Density and shift are functions: what they sample tells them apart
        numbers = self.density(8, keyed_generator("describe"))
        sigmas = [self.shift(numbers, (side, side)).tolist() for side in (64, 128)]
        return {"process": "rectified flow", "num_timesteps": self.num_timesteps, "sigmas": sigmas}
