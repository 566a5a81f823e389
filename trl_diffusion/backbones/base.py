# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What training needs of a diffusers pipeline, whatever its family."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..process import Process
from .checks import check_module, plain_tokenizer
from .offloading import offload_by_layer, stop_offloading
from .quantization import describe_quantization
from .source import FreedComponent, PipelineSource
from .vae import posterior_moments


MAX_PIXELS = 1024**2  # that the VAE encodes at a time; its first layer makes 128 channels of them: 0.5 GiB in float32


class Backbone(ABC):
    """
    A pipeline as training sees it: a denoiser, frozen encoders, and a process.

    A family implements the abstract methods and sets the class attributes. Images are latents `(B, C, h, w)` everywhere
    outside of a backbone; packing, position ids and further dimensions are its own. Prompts are dictionaries of tensors whose
    first dimension is `B`, called conditions. Sequences are padded with zeros to the longest of the batch; where the family
    masks the padding, `prompt_lengths` `(B,)` is among the conditions, and a cache stores each sequence at its own length.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The loaded pipeline. Its encoders are frozen.
        source ([`backbones.source.PipelineSource`], *optional*):
            Where the pipeline was loaded from, if it was given by its name. Its denoiser may then still have no weights.

    Attributes:
        pipeline_class (`type`):
            The pipeline family.
        denoiser_name (`str`):
            Name of the pipeline's component that is trained.
        text_encoder_names (`tuple[str, ...]`):
            Names of the components that encode prompts.
        lora_target_modules (`tuple[str, ...]`):
            Names of the modules that a LoRA adapts if its configuration names none: the attention projections.
        tokenizer_names (`tuple[str, ...]`):
            Names of the components that cut prompts into tokens.
        max_sequence_length (`int` or `None`):
            Number of tokens that prompts are padded to, where the pipeline leaves the choice.
        longest_sequence (`int`):
            The largest number that it may be.
        embedded_guidance (`float` or `None`):
            The guidance scale that the denoiser is told in training, where it takes one.
        guidance_hint (`str` or `None`):
            How to have the pipeline sample with an unconditional branch, where it calls the denoiser once for each branch and may
            do without: sampling without one is then refused where a branch has a model of its own.
        true_guidance (`dict[str, Any]`):
            Arguments of the pipeline's call by which it has an unconditional branch, where it has none without them.
        unguided_scale (`float`):
            The largest guidance scale at which the pipeline has no unconditional branch.
        padded_conditions (`tuple[str, ...]`):
            Names of the text conditions that `prompt_lengths` belongs to; none where padding is not masked.
        host_conditions (`tuple[str, ...]`):
            Names of the text conditions that stay on the CPU, where the shapes of what is computed follow from them: the host would
            have to wait for the device to know them.
        has_comfyui_names (`bool`):
            Whether ComfyUI knows names for the weights of a LoRA, see [`export_lora`].
        process ([`process.Process`]):
            How latents are noised, and what the denoiser predicts.
        quantization (`dict[str, str]`):
            How those components are quantised that are, by name.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    text_encoder_names: tuple[str, ...]
    tokenizer_names: tuple[str, ...]
    lora_target_modules: tuple[str, ...]
    max_sequence_length: int | None = None
    longest_sequence: int = 512
    embedded_guidance: float | None = None
    guidance_hint: str | None = None
    true_guidance: dict[str, Any] = {}
    unguided_scale: float = 1.0
    padded_conditions: tuple[str, ...] = ()
    host_conditions: tuple[str, ...] = ()
    has_comfyui_names: bool = True
    posterior_moments = staticmethod(posterior_moments)  # of images; a family's own where its VAE is called otherwise

    def __init__(self, pipeline: DiffusionPipeline, source: PipelineSource | None = None):
        self.pipeline = pipeline
        self.source = source
        self.process = self.make_process()
        for name in self.encoder_names:
            getattr(pipeline, name).requires_grad_(False).eval()
        self.device = torch.device("cpu")
        self.channels_last = False
        self.offloaded: tuple[str, ...] = ()
        self.casts: dict[str, torch.dtype] = {}
        self.saved_in: Path | None = None  # the last checkpoint of the whole pipeline
        self.offloads_encoders = False
        names = self.denoiser_name, *self.encoder_names
        self.quantization = {name: how for name in names if (how := self._how_quantized(name))}

    # ---- What a family says of itself ----

    @staticmethod
    @abstractmethod
    def check(pipeline: DiffusionPipeline) -> None:
        """Raises a `ValueError` where something about a pipeline of this family would make training it wrong."""

    @abstractmethod
    def check_reference(self, pipeline: DiffusionPipeline) -> None:
        """Raises a `ValueError` where another pipeline cannot be the reference of this one."""

    @abstractmethod
    def make_process(self) -> Process:
        """The process that the denoiser was trained with."""

    @property
    @abstractmethod
    def default_resolution(self) -> int:
        """Width and height in pixels that the denoiser was trained at."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Width and height of an image must be multiples of this number of pixels."""

    @property
    def prompt_limits(self) -> dict[str, int]:
        """The longest prompt in tokens, special ones included, by the name of the tokenizer: by default what each one says."""
        return {name: getattr(self.pipeline, name).model_max_length for name in self.tokenizer_names}

    @property
    def text_settings(self) -> tuple[Any, ...]:
        """What the embeddings of a prompt depend on besides tokenizers, text encoders and `max_sequence_length`: a cache is of these."""
        return ()

    @abstractmethod
    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        """
        Encodes prompts to the denoiser's text conditions.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts. `None` is the branch that classifier-free guidance calls unconditional, as the pipeline makes it.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `B`, on the device but for those of `host_conditions`.
        """

    def image_conditions(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """
        The denoiser's conditions that describe how an image was made; none for most families.

        Args:
            original_sizes (`torch.Tensor` of shape `(B, 2)`):
                (height, width) in pixels of the upright image before resizing.
            crop_top_lefts (`torch.Tensor` of shape `(B, 2)`):
                (top, left) in pixels of the crop in the resized image.
            target_size (`tuple[int, int]`):
                (height, width) in pixels of the crop.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `B`.
        """
        return {}

    @abstractmethod
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """
        Calls a denoiser of this family.

        Args:
            denoiser (`torch.nn.Module`):
                Policy or reference, wrapped or not.
            noisy_latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents `x_t`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps of the process.
            conditions (`dict[str, torch.Tensor]`):
                Results of [`~Backbone.encode_prompts`] and [`~Backbone.image_conditions`] together.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: the prediction, as the process defines it.
        """

    @staticmethod
    @abstractmethod
    def guidance_branches(
        pipeline: DiffusionPipeline, context: str | None, arguments: dict[str, Any]
    ) -> tuple[str, ...]:
        """
        The branches of classifier-free guidance that are in one call of the denoiser while the pipeline samples, in the order
        of their rows.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The pipeline.
            context (`str` or `None`):
                What the pipeline calls the call, `"cond"` or `"uncond"`, where it calls the denoiser once for each branch. Where
                it names no call, `"again"` is a further one in a row with the same tensor as `timestep`: the second branch
                of a pipeline that calls the denoiser for the conditional branch first.
            arguments (`dict[str, Any]`):
                The arguments of the call by their names in the denoiser's `forward`, positional ones too.

        Returns:
            `tuple[str, ...]`: `"conditional"`, `"unconditional"` or both.
        """

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        """
        The arguments of the pipeline's call for a guidance scale, as its users write them: the scale first, then what else
        guidance needs, such as a negative prompt.
        """
        return {"guidance_scale": scale}

    @staticmethod
    def sampling_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
        """
        What a pipeline is sampled with where nothing else is asked for, if it is not the default of its call: `guidance_scale`
        and `num_inference_steps`, such as those of a distilled model whose configuration says that it is one.

        Args:
            config (`Mapping[str, Any]`):
                The pipeline's configuration, the content of `model_index.json`.

        Returns:
            `dict[str, Any]`
        """
        return {}

    # ---- What all families share ----

    def configure(self, max_sequence_length: int | None, embedded_guidance: float | None) -> None:
        """Sets what a run may choose; `None` is the family's default. Raises a `ValueError` where there is no choice."""
        given = {"max_sequence_length": max_sequence_length, "embedded_guidance": embedded_guidance}
        for name, value in given.items():
            if value is None:
                continue
            if getattr(self, name) is None:
                raise ValueError(
                    f"`{name}` is {value}, but this `{type(self.pipeline).__name__}` leaves no choice of it. Leave it out."
                )
            setattr(self, name, value)
        if self.max_sequence_length is not None and self.max_sequence_length > self.longest_sequence:
            raise ValueError(
                f"`max_sequence_length` is {self.max_sequence_length}, and a `{type(self.pipeline).__name__}` takes 1 to "
                f"{self.longest_sequence} tokens."
            )
        if not self.fits(""):
            raise ValueError(
                f"`max_sequence_length` is {self.max_sequence_length}, and the text around a prompt alone has more tokens, so that no "
                "prompt would be read. Leave it out, or raise it."
            )

    def set_timestep_density(self, density: str, **settings: float) -> None:
        """
        Sets the density that timesteps are sampled from.

        Args:
            density (`str`):
                `"uniform"`, or for rectified flows `"logit_normal"` or `"mode"`.
            **settings (`float`):
                `logit_mean`, `logit_std` and `mode_scale` of diffusers' `compute_density_for_timestep_sampling`.

        Raises:
            `ValueError`: If the timesteps of this family are always uniform.
        """
        if density != "uniform":
            raise ValueError(
                f"`timestep_density` is {density!r}, but a `{type(self.pipeline).__name__}` is no rectified flow: its timesteps "
                "are sampled uniformly. Leave `timestep_density` out."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What a run trains with where its configuration leaves it to the family."""
        return {
            "timestep_range": list(self.process.timestep_range),
            "max_sequence_length": self.max_sequence_length,
            "embedded_guidance": self.embedded_guidance,
        }

    @property
    def sampling_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call by which it encodes prompts as the training does."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}

    @property
    def denoiser(self) -> torch.nn.Module:
        """The component that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Names of the frozen components that training needs."""
        return "vae", *self.text_encoder_names

    @property
    def vae_scale_factor(self) -> int:
        """Number of pixels along a side of a latent position."""
        return self.pipeline.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.pipeline.vae.config.latent_channels

    def check_resolution(self, resolution: int | None) -> int:
        """The resolution in pixels, or the default one. Raises a `ValueError` where the VAE cannot encode such an image."""
        resolution = resolution or self.default_resolution
        if resolution % self.vae_scale_factor:
            raise ValueError(
                f"`resolution` is {resolution}, which is no multiple of {self.vae_scale_factor}, the number of pixels along a "
                "side of a latent position of this VAE."
            )
        return resolution

    def _how_quantized(self, name: str) -> str | None:
        module = getattr(self.pipeline, name)
        if hasattr(module, "awaits_weights"):
            return self.source.planned_quantization(name)
        return describe_quantization(module)

    def load_denoiser(self) -> torch.nn.Module:
        """
        The denoiser with its weights, which are loaded now where the pipeline was loaded without them.

        Raises:
            `ValueError`: If it cannot be trained rightly.
        """
        name = self.denoiser_name
        if hasattr(self.denoiser, "awaits_weights"):
            setattr(self.pipeline, name, self.source.load(self.pipeline, (name,))[name])
            check_module(name, self.denoiser)
            if how := self._how_quantized(name):
                self.quantization[name] = how
        return self.denoiser

    def cast_encoders(self, half_dtype: torch.dtype | None) -> list[str]:
        """
        Casts the encoders whose precision does not go with that of a run: to float32 without mixed precision, and another half
        precision to that of the run. A VAE that is kept out of autocast (`force_upcast`) keeps its own.

        Args:
            half_dtype (`torch.dtype` or `None`):
                The type of mixed precision, if any.

        Returns:
            `list[str]`: the names of those that were cast, now and whenever they are loaded again.
        """
        for name in self.encoder_names:
            encoder = getattr(self.pipeline, name)
            is_apart = half_dtype is not None and name == "vae" and encoder.config.get("force_upcast", False)
            if encoder.dtype not in (torch.float32, half_dtype) and not is_apart:
                self.casts[name] = half_dtype or torch.float32
                torch.nn.Module.to(encoder, self.casts[name])  # that of diffusers warns of every cast
        return list(self.casts)

    def to(self, device: torch.device, channels_last: bool = False, offloads_encoders: bool = False) -> None:
        """
        Moves the encoders to a device (the Trainer moves the denoiser), or has them pass through it layer by layer, and lays out the
        VAE as asked.
        """
        self.device, self.channels_last, self.offloads_encoders = device, channels_last, offloads_encoders
        self._place(tuple(name for name in self.encoder_names if name not in self.offloaded))

    def _place(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._move(getattr(self.pipeline, name))
        if self.channels_last and "vae" in names:
            vae = self.pipeline.vae
            if all(parameter.ndim < 5 for parameter in vae.parameters()):  # one of videos cannot be laid out so
                vae.to(memory_format=torch.channels_last)

    def _move(self, encoder: torch.nn.Module) -> None:
        if self.offloads_encoders:
            offload_by_layer(encoder, self.device)
        else:
            stop_offloading(encoder)
            encoder.to(self.device)

    def offload(self, names: tuple[str, ...]) -> None:
        """
        Takes encoders that training no longer needs off the device: those of a loaded pipeline go to the CPU, those of a
        pipeline that was given by its name are freed. They come back in [`~Backbone.encoders_on_device`].

        Args:
            names (`tuple[str, ...]`):
                Names of these encoders.
        """
        self.offloaded = names
        for name in names:
            if self.source is None:
                stop_offloading(getattr(self.pipeline, name))
                getattr(self.pipeline, name).to("cpu")
            else:  # past the pipeline's `__setattr__`, so that its configuration still names the component
                vars(self.pipeline)[name] = FreedComponent(name)
        if names:
            clear_device_cache(garbage_collection=True)

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """Brings offloaded encoders back to the device while the context lasts, from the CPU or from the disk."""
        names, self.offloaded = self.offloaded, ()
        try:
            if self.source is not None:
                for name, module in self.source.load(self.pipeline, names).items():
                    torch.nn.Module.to(module, self.casts.get(name))
                    setattr(self.pipeline, name, module.requires_grad_(False).eval())
            self._place(names)
            yield
        finally:
            self.offload(names)

    @contextmanager
    def complete(self) -> Iterator[DiffusionPipeline]:
        """
        Lends the pipeline to be saved, with all encoders, in the precision that they have without mixed precision. One of the user's
        own class is lent as one of its family, whose name is saved, so that plain diffusers loads it.

        Yields:
            [`~diffusers.DiffusionPipeline`]
        """
        components = vars(self.pipeline)
        lent: dict[str, torch.nn.Module] = {}
        if self.source is not None:
            rounded = self.text_encoder_names if self.source.is_rounded else ()
            names = tuple(name for name in self.encoder_names if name in (*self.offloaded, *rounded))
            lent = self.source.load(self.pipeline, names, is_rounded=False)
        own = {name: components[name] for name in lent}
        components.update(lent)
        own_class, self.pipeline.__class__ = type(self.pipeline), self.pipeline_class
        try:
            yield self.pipeline
        finally:
            components.update(own)
            self.pipeline.__class__ = own_class

    @staticmethod
    def templated(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, prompt: str) -> str:
        """What a tokenizer is given for a prompt: the prompt, with a template around it where the family has one."""
        return prompt

    @classmethod
    def num_tokens(cls, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, prompt: str) -> int:
        """How many tokens a prompt has for a tokenizer, special ones and those of the template included."""
        return len(plain_tokenizer(tokenizer)(cls.templated(tokenizer, prompt), verbose=False).input_ids)

    def fits(self, prompt: str) -> bool:
        """Whether the text encoders read the whole of a prompt."""
        return all(
            self.num_tokens(getattr(self.pipeline, name), prompt) <= limit
            for name, limit in self.prompt_limits.items()
        )

    @contextmanager
    def sampling_with(self, denoiser: torch.nn.Module) -> Iterator[DiffusionPipeline]:
        """
        Lends the pipeline with another denoiser in evaluation mode, and with its VAE in float32, as the latents are; afterwards
        pipeline and denoiser are as they were.

        Args:
            denoiser (`torch.nn.Module`):
                Policy or reference, not wrapped.

        Yields:
            [`~diffusers.DiffusionPipeline`]
        """
        own, was_training = self.denoiser, denoiser.training
        setattr(self.pipeline, self.denoiser_name, denoiser.eval())
        try:
            with self.encoders_on_device(), in_float32(self.pipeline.vae):
                yield self.pipeline
        finally:
            setattr(self.pipeline, self.denoiser_name, own)
            denoiser.train(was_training)

    def pipeline_with(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """
        A pipeline with another denoiser, in evaluation mode, and with all encoders, which stay on the device.

        Args:
            denoiser (`torch.nn.Module`):
                The policy, not wrapped.

        Returns:
            [`~diffusers.DiffusionPipeline`]
        """
        with self.encoders_on_device():
            pipeline = copy.copy(self.pipeline)
        for name in self.encoder_names:
            self._move(getattr(pipeline, name))
        setattr(pipeline, self.denoiser_name, denoiser.eval())
        return pipeline

    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images to the moments of the VAE's posterior, so many at a time as have `MAX_PIXELS` together. What is alive in the
        VAE then does not grow with the batch, and one image of 1024 pixels a side is work enough for a GPU.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: mean and standard deviation of the latents
            in the denoiser's scale, float32. The deviation is 0 where the VAE has no posterior.
        """
        size = max(1, MAX_PIXELS // (pixel_values.shape[2] * pixel_values.shape[3]))
        vae = self.pipeline.vae
        slices = pixel_values.split(size)
        moments = [self.posterior_moments(vae, images.to(vae.device, vae.dtype)) for images in slices]
        mean, std = (torch.cat(values) for values in zip(*moments, strict=True))
        shift, scale = (value.to(mean.device, non_blocking=True) for value in self.latent_statistics())
        return (mean - shift) * scale, std * scale

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the pipeline subtracts from the VAE's latents, and then multiplies them by.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: shift and scale, of shape `(1, 1, 1, 1)`, or `(1, C, 1, 1)` where the VAE has
            statistics for each channel.
        """
        config = self.pipeline.vae.config
        shift = torch.tensor(config.get("latents_mean") or [config.get("shift_factor") or 0.0])
        scale = (config.get("scaling_factor") or 1.0) / torch.tensor(config.get("latents_std") or [1.0])
        return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def save_lora(self, folder: str | Path, weights: dict[str, torch.Tensor], config: LoraConfig) -> None:
        """
        Saves a LoRA of the denoiser as `pipeline.load_lora_weights` reads it.

        Args:
            folder (`str` or `Path`):
                Where `pytorch_lora_weights.safetensors` goes.
            weights (`dict[str, torch.Tensor]`):
                The weights, by the names that a [`~peft.PeftModel`] gives them.
            config ([`~peft.LoraConfig`]):
                The configuration. Without it in the file, alpha would silently become the rank when the file is loaded.
        """
        name = self.denoiser_name
        layers = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
        self.pipeline.save_lora_weights(
            folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": config.to_dict()}
        )


@contextmanager
def in_float32(vae: torch.nn.Module) -> Iterator[None]:
    """
    Casts a VAE to float32 while the context lasts, which rounds nothing, and with it the latents that it decodes: before a training has
    prepared the denoiser, pipelines leave them in half precision.
    """
    dtype, decode = vae.dtype, vae.decode
    torch.nn.Module.to(vae, torch.float32)  # that of diffusers warns of every cast
    vae.decode = lambda latents, *args, **kwargs: decode(latents.float(), *args, **kwargs)
    try:
        yield
    finally:
        del vae.decode
        torch.nn.Module.to(vae, dtype)
