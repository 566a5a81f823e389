# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""FLUX.2-klein, base and distilled: Qwen3's hidden layers, and a flow transformer on patches of a VAE with statistics of its own."""

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from .flow import FlowBackbone
from .flow_checks import check_chat, check_thousand_timesteps
from .flux_2_checks import check_flux_2_vae, check_hidden_layers, check_same_statistics
from .vae import batch_norm_statistics, patchified_moments


class Flux2KleinBackbone(FlowBackbone):
    """
    A [`~diffusers.Flux2KleinPipeline`] as training sees it. See [`backbones.base.Backbone`]. Latents are `(B, 128, h, w)`, a position
    for 16 x 16 pixels.

    The pipeline shifts its schedule by the size of the image and by the number of steps. Timesteps are trained as it samples them in 50
    steps, the default of its call, whether the model is distilled or not.
    """

    pipeline_class = Flux2KleinPipeline
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    transformer_class = Flux2Transformer2DModel
    text_encoder_classes = {"text_encoder": "Qwen3ForCausalLM"}
    attention_processors = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    transformer_inputs = ("in_channels", "joint_attention_dim", "guidance_embeds")
    vae_settings = ("batch_norm_eps",)
    max_sequence_length = 512  # the pipeline's default
    guidance_hint = "pass a `guidance_scale` above 1 to it; a distilled model has none"
    patch_size = 1  # latents are patches already
    posterior_moments = staticmethod(patchified_moments)

    def __init__(self, pipeline, source=None):
        super().__init__(pipeline, source)
        self.position_ids: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}  # the pipeline makes them on the CPU

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_thousand_timesteps(pipeline)
        check_flux_2_vae(pipeline)
        check_hidden_layers(pipeline, pipeline.text_encoder.config, (9, 18, 27))  # the pipeline's default
        check_chat(pipeline)

    def check_reference(self, pipeline) -> None:
        super().check_reference(pipeline)
        check_same_statistics(self.pipeline.vae, pipeline.vae)

    @property
    def lora_target_modules(self) -> tuple[str, ...]:
        # A single block has one layer for queries, keys, values and its feed-forward network, and one behind both
        blocks = range(self.denoiser.config.num_single_layers)
        outputs = (f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)
        return *FlowBackbone.lora_target_modules, "to_qkv_mlp_proj", *outputs

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def vae_scale_factor(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return 4 * self.pipeline.vae.config.latent_channels

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_norm_statistics(self.pipeline.vae)

    def shift_for(self, num_patches: int) -> float:
        return compute_empirical_mu(num_patches, 50)  # steps, the default of the pipeline's call

    @staticmethod
    def templated(tokenizer, prompt) -> str:
        settings = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **settings)

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            [prompt or "" for prompt in prompts], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        prompt_embeds, guidance = conditions["prompt_embeds"], self.embedded_guidance
        settings = *noisy_latents.shape[2:], prompt_embeds.shape[1], noisy_latents.device
        if settings not in self.position_ids:
            text, image = (
                self.pipeline._prepare_text_ids(prompt_embeds),
                self.pipeline._prepare_latent_ids(noisy_latents),
            )
            self.position_ids[settings] = text[0].to(noisy_latents.device), image[0].to(noisy_latents.device)
        txt_ids, img_ids = self.position_ids[settings]
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents),
            timestep=timesteps.to(noisy_latents.dtype) / 1000,  # the transformer multiplies by 1000
            guidance=None if guidance is None else torch.full_like(timesteps, guidance, dtype=torch.float32),
            encoder_hidden_states=prompt_embeds,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return packed.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])

    @staticmethod
    def sampling_defaults(config) -> dict[str, float | int]:
        return {"guidance_scale": 1.0, "num_inference_steps": 4} if config.get("is_distilled") else {}
