# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The contenders' steps: the least work that Diffusion-DPO needs, two published scripts of it, and diffusers' LoRA script."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from trl_diffusion.process import DiscreteProcess


BETA = 2000.0
INPO_INVERSION_TIMESTEPS = [100 * step - 99 for step in range(10)]  # diffusers 0.20, which the script is pinned to
INPO_INVERSION_ETA = 0.1


def predict(
    denoiser: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Calls a UNet, or the transformer of Stable Diffusion 3, with the conditions of its family."""
    if "pooled_prompt_embeds" in conditions:
        return denoiser(
            noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
    added = {name: value for name, value in conditions.items() if name != "prompt_embeds"}
    return denoiser(
        noisy_latents,
        timesteps,
        encoder_hidden_states=conditions["prompt_embeds"],
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


def pair_errors(prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Squared errors, `(2, B)`: chosen, rejected."""
    return (prediction.float() - noise.float()).square().mean(dim=(1, 2, 3)).unflatten(0, (2, -1))


def margins(errors: torch.Tensor, ref_errors: torch.Tensor) -> torch.Tensor:
    """What the sigmoid is taken of, `(B,)`."""
    return -0.5 * BETA * ((errors[0] - errors[1]) - (ref_errors[0] - ref_errors[1]))


def dpo_loss(prediction: torch.Tensor, ref_prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The Diffusion-DPO loss of a batch of pairs, chosen then rejected."""
    return -F.logsigmoid(margins(pair_errors(prediction, noise), pair_errors(ref_prediction, noise))).mean()


# ----- the least work -----


@dataclass
class Given:
    """A batch of pairs, chosen then rejected, as the denoiser gets it: all rows on the device, in the weights' precision."""

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor
    conditions: dict[str, torch.Tensor]

    def ask(self, denoiser: torch.nn.Module) -> torch.Tensor:
        return predict(denoiser, self.noisy_latents, self.timesteps, self.conditions)


def floor_step(policy: torch.nn.Module, reference: torch.nn.Module, given: Given) -> None:
    """Forward and backward of the policy, forward of the reference."""
    with torch.no_grad():
        ref_prediction = given.ask(reference)
    dtype = given.noise.dtype
    with torch.autocast(given.noise.device.type, dtype, enabled=dtype != torch.float32):
        prediction = given.ask(policy)
    dpo_loss(prediction, ref_prediction, given.noise).backward()


@torch.no_grad()
def yardstick_step(reference: torch.nn.Module, given: Given) -> None:
    """One forward of the frozen denoiser."""
    given.ask(reference)


# ----- the published scripts -----


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return module if module.dtype == dtype else module.to(dtype)  # diffusers warns of casts that change nothing


@dataclass
class PixelPairs:
    """A batch as the scripts' data loaders give it, on the CPU: images chosen then rejected, tokens of each tokenizer."""

    pixel_values: torch.Tensor
    input_ids: list[torch.Tensor]

    def as_images(self) -> "PixelPairs":
        """The same images, each with its own prompt."""
        return PixelPairs(self.pixel_values, [ids.repeat(2, 1) for ids in self.input_ids])


class Script:
    """
    What the scripts have in common: the frozen models are held in half precision where there is autocast, and images and
    prompts are encoded in every step.
    """

    def __init__(self, pipeline: DiffusionPipeline, accelerator: Accelerator, dtype: torch.dtype):
        self.accelerator, self.pipeline, self.dtype = accelerator, pipeline, dtype
        self.text_encoders = [
            encoder
            for encoder in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
            if encoder is not None
        ]
        for frozen in (pipeline.vae, *self.text_encoders):
            cast(frozen.requires_grad_(False), dtype)
        self.process = DiscreteProcess(pipeline.scheduler.alphas_cumprod, "epsilon")

    @torch.no_grad()
    def encode(self, pairs: PixelPairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents of all images, sampled from the posterior, and their conditions, encoded once for each row of tokens."""
        device, vae = self.accelerator.device, self.pipeline.vae
        pixel_values = pairs.pixel_values.to(device, self.dtype)
        latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
        input_ids = [ids.to(device) for ids in pairs.input_ids]
        copies = len(latents) // len(input_ids[0])
        if len(self.text_encoders) == 1:
            return latents, {"prompt_embeds": self.text_encoders[0](input_ids[0])[0].repeat(copies, 1, 1)}
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.text_encoders, input_ids, strict=True)
        ]
        size = pixel_values.shape[-1]
        time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=self.dtype, device=device)
        return latents, {
            "prompt_embeds": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).repeat(copies, 1, 1),
            "text_embeds": outputs[1].text_embeds.repeat(copies, 1),
            "time_ids": time_ids.expand(len(latents), 6),
        }

    def log(self, rows: int, *values: torch.Tensor) -> None:
        """Averages over the rows of all processes, on the host, as the scripts do in every micro-batch."""
        for value in values:
            self.accelerator.gather(value.detach().repeat(rows)).mean().item()

    def update(self, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PairScript(Script):
    """
    What the scripts of Diffusion-DPO and InPO have in common. All weights are trained, in float32 under autocast. InPO inverts
    with the policy of the moment, all images of a batch to the batch's one timestep.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        accelerator: Accelerator,
        dtype: torch.dtype,
        make_optimizer: Callable[..., torch.optim.Optimizer],
    ):
        super().__init__(pipeline, accelerator, dtype)
        self.reference = cast(copy.deepcopy(pipeline.unet).requires_grad_(False), dtype)
        policy = pipeline.unet.requires_grad_(True).train()
        self.policy, self.optimizer = accelerator.prepare(policy, make_optimizer(policy.parameters()))

    def random_noise(
        self, latents: torch.Tensor, timestep: int, conditions: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised latents and their noise, which the pair shares."""
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        return self.process.add_noise(latents, noise, timesteps).to(self.dtype), noise

    @torch.no_grad()
    def inversion(
        self, latents: torch.Tensor, timestep: int, conditions: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised latents by DDIM inversion with the policy as it is, and the noise that explains them."""
        walk = [max(step, 0) for step in INPO_INVERSION_TIMESTEPS if step < timestep]
        process, noisy_latents = self.process, latents
        for step in zip(walk, [*walk[1:], timestep], strict=True):
            here, there = (torch.full((len(latents),), timestep, device=latents.device) for timestep in step)
            prediction = predict(self.policy, noisy_latents, here, conditions)
            noisy_latents = process.add_noise(*process.split(prediction, noisy_latents, here), there).to(self.dtype)
            deviation = process.posterior_variance(here[:1], there[:1]).sqrt()
            noisy_latents += INPO_INVERSION_ETA * deviation * torch.randn_like(noisy_latents)
        return noisy_latents, process.explaining_noise(latents, noisy_latents, there)

    def micro_step(self, pairs: PixelPairs, timestep: int, noised: Callable) -> None:
        """One batch, at one timestep, with noise from `random_noise` or `inversion`."""
        with self.accelerator.accumulate(self.policy):
            latents, conditions = self.encode(pairs)
            noisy_latents, noise = noised(self, latents, timestep, conditions)
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            errors = pair_errors(predict(self.policy, noisy_latents, timesteps, conditions), noise)
            with torch.no_grad():
                ref_errors = pair_errors(predict(self.reference, noisy_latents, timesteps, conditions), noise)
            inside = margins(errors, ref_errors)
            loss = -F.logsigmoid(inside).mean()
            self.log(len(inside), loss, errors.mean(), ref_errors.mean(), (inside > 0).float().mean())
            self.update(loss, list(self.policy.parameters()))


class LoraScript(Script):
    """
    The step of diffusers' script that trains a LoRA on single images: the plain denoising loss, without a reference. The UNet is
    held in half precision, and so is the LoRA under bfloat16.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        accelerator: Accelerator,
        dtype: torch.dtype,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        lora: LoraConfig,
    ):
        super().__init__(pipeline, accelerator, dtype)
        unet: UNet2DConditionModel = cast(pipeline.unet.requires_grad_(False), dtype)
        unet.add_adapter(lora)
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.policy, self.optimizer = accelerator.prepare(unet.train(), make_optimizer(self.trained))

    def micro_step(self, images: PixelPairs) -> None:
        """One batch, each image with its own prompt, noise and timestep."""
        with self.accelerator.accumulate(self.policy):
            latents, conditions = self.encode(images)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.process.num_timesteps, (len(latents),), device=latents.device)
            noisy_latents = self.process.add_noise(latents, noise, timesteps).to(self.dtype)
            prediction = predict(self.policy, noisy_latents, timesteps, conditions)
            loss = F.mse_loss(prediction.float(), noise.float())
            self.log(len(latents), loss)
            self.update(loss, self.trained)
