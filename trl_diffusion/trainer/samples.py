# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images by the model that is trained, or by another one, such as a distilled sibling, that its LoRA is put on."""

import filecmp
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import PIL.Image
import torch
from accelerate.logging import get_logger
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel

from ..backbones.base import Backbone, in_float32
from ..backbones.names import find_model
from ..backbones.source import FreedComponent, PipelineSource, read_index
from ..lora_files import base_modules, empty_copy, find_lora, load_lora, targeted_modules
from ..sampling import default_argument, default_guidance, sample_images
from .diffusion_config import DiffusionConfig
from .fingerprints import NO_MATTER
from .lora import with_target_modules
from .reference import Reference
from .sharding import is_sharded, whole_lora


logger = get_logger(__name__)

ADAPTER = "default"  # the one that is trained
LOCATION = ("cache_dir", "token", "local_files_only")
NOT_COMPARED = {"_name_or_path", "_diffusers_version", *NO_MATTER}  # in configurations


class Samples:
    """
    Draws the images of a training.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.
        backbone ([`backbones.base.Backbone`]):
            The backbone. Its denoiser may still have no weights.
        resolution (`int`):
            Width and height in pixels of the images.
        peft_config ([`~peft.LoraConfig`] or `None`):
            The LoRA, if one is trained.

    Raises:
        `ValueError`: If `args.sample_model` cannot draw with the LoRA, see [`trainer.samples.SampleModel`].
    """

    def __init__(self, args: DiffusionConfig, backbone: Backbone, resolution: int, peft_config: LoraConfig | None):
        self.args, self.backbone, self.resolution = args, backbone, resolution
        self.other = None if args.sample_model is None else SampleModel(args, backbone, peft_config)

    def draw(
        self, prompts: list[str], policy: torch.nn.Module, reference: Reference | None, with_reference: bool
    ) -> list[PIL.Image.Image]:
        """
        Draws one image for each prompt.

        Args:
            prompts (`list[str]`):
                The prompts.
            policy (`torch.nn.Module`):
                The policy, not wrapped.
            reference ([`trainer.reference.Reference`] or `None`):
                The reference, where there is one.
            with_reference (`bool`):
                Whether the reference draws in place of the policy; of a sample model, what it is without the training.

        Returns:
            `list[PIL.Image.Image]`
        """
        with self._lent(policy, reference, with_reference) as pipeline:
            return sample_images(pipeline, prompts, **self._settings(pipeline))

    @contextmanager
    def _lent(
        self, policy: torch.nn.Module, reference: Reference | None, with_reference: bool
    ) -> Iterator[DiffusionPipeline]:
        if self.other is not None:
            without = None if reference is None else reference.adapter
            with self.other.lend(policy, without if with_reference else ADAPTER) as pipeline:
                yield pipeline
            return
        with reference.lend(policy) if with_reference else nullcontext(policy) as denoiser:
            with self.backbone.sampling_with(extract_model_from_parallel(denoiser)) as pipeline:
                yield pipeline

    def _settings(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        settings = self.args.sampling_settings(self.resolution) | self.backbone.sampling_settings
        if self.args.num_inference_steps is None:
            settings["num_inference_steps"] = default_steps(self.backbone, pipeline.config)
        return settings

    def pipeline(self, policy: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline that draws with the policy, not wrapped: its own, or that of the sample model with the LoRA as it is now."""
        if self.other is None:
            return self.backbone.pipeline_with(policy)
        with self.other.encoders():
            return self.other.load(policy, ADAPTER)


class SampleModel:
    """
    Another model of the architecture that is trained. The LoRA is put on its denoiser. It is loaded for each drawing and freed after it;
    encoders that are those of the trained pipeline are borrowed, and the frozen weights of the policy make room on the device.

    Args:
        args ([`DiffusionConfig`]):
            The configuration, whose `sample_model` names it.
        backbone ([`backbones.base.Backbone`]):
            The backbone of the model that is trained.
        peft_config ([`~peft.LoraConfig`] or `None`):
            The LoRA; `None` where all weights are trained.

    Raises:
        `ValueError`: If no LoRA is trained, there is no such pipeline, or the LoRA does not fit it.
    """

    def __init__(self, args: DiffusionConfig, backbone: Backbone, peft_config: LoraConfig | None):
        self.name, self.backbone, self.half_dtype = args.sample_model, backbone, args.half_dtype
        if peft_config is None:
            raise ValueError(
                f"`sample_model` is {self.name}, and all weights are trained: only a LoRA can be put on another model. Train one with "
                "`peft_config` (`--use_peft`), or leave out `sample_model`."
            )
        path = find_model(self.name)
        if Path(path).is_file():
            raise ValueError(
                f"`sample_model` {self.name} is a single file. Save it as a pipeline's folder, by `save_pretrained`, and name that."
            )
        dtype = {"default": args.half_dtype or torch.float32, "vae": torch.float32}
        location = {key: value for key, value in (args.model_init_kwargs or {}).items() if key in LOCATION}
        try:
            index = read_index(path, location)
        except (OSError, ValueError) as error:
            raise ValueError(f"`sample_model` {self.name} cannot be read: {str(error).splitlines()[0]}") from error
        if index["_class_name"] != backbone.pipeline_class.__name__:
            self._refuse(f"it is a `{index['_class_name']}`, and a `{backbone.pipeline_class.__name__}` is trained")
        self.source = PipelineSource(path, dtype, dtype, **location)
        self._check_fits(with_target_modules(peft_config, backbone.lora_target_modules))
        if not backbone.sampling_defaults(index):
            self._warn_of_defaults(args, index)

    def _check_fits(self, config: LoraConfig) -> None:
        """The LoRA's modules are the same in both denoisers; only their configurations are read."""
        name = self.backbone.denoiser_name
        other = self.source.empty(name)
        kinds = type(self.backbone.denoiser).__name__, type(other).__name__
        if kinds[0] != kinds[1]:
            self._refuse(f"its `{name}` is a `{kinds[1]}`, and a `{kinds[0]}` is trained")
        own, others = (
            {target: tuple(modules[target].weight.shape) for target in targeted_modules(config, modules)}
            for modules in (base_modules(empty_copy(self.backbone.denoiser)), base_modules(other))
        )
        for there, here, what in ((own, others, "is without"), (others, own, "would also adapt")):
            if only := [target for target in there if target not in here]:
                self._refuse(
                    f"its `{name}` {what} {len(only)} of the modules that the LoRA adapts, such as `{only[0]}`"
                )
        if differing := [target for target in own if own[target] != others[target]]:
            shapes = f"{others[differing[0]]}, and {own[differing[0]]} is trained"
            self._refuse(f"the weight of `{differing[0]}` has the shape {shapes}")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"`sample_model` {self.name} cannot draw with the LoRA that is trained: {what}. Name a model of the same architecture, such "
            "as a distilled version of the one that is trained, or leave `sample_model` out."
        )

    def _warn_of_defaults(self, args: DiffusionConfig, index: dict[str, Any]) -> None:
        defaults = {
            "num_inference_steps": default_steps(self.backbone, index),
            "guidance_scale": default_guidance(self.backbone.pipeline_class, index),
        }
        if left := [f"`{name}={value}`" for name, value in defaults.items() if getattr(args, name) is None]:
            logger.warning(
                f"{self.name} draws samples with {' and '.join(left)}, as every `{index['_class_name']}` where nothing else is asked for. "
                "A distilled model takes fewer steps and no guidance: set both as its card says."
            )

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Names of the encoders whose files are those of the pipeline that is trained."""
        source = self.backbone.source
        if source is None:  # a loaded pipeline, whose weights may be others than those of its files
            return ()
        given = {*source.kwargs, *(["vae"] if source.vae_name else [])}
        folders = Path(source.folder), Path(self.source.folder)
        names = [name for name in self.backbone.encoder_names if name not in given]
        return tuple(name for name in names if same_files(*(folder / name for folder in folders)))

    @contextmanager
    def encoders(self) -> Iterator[None]:
        """Has the encoders of the trained pipeline on the device, if any are borrowed."""
        with self.backbone.encoders_on_device() if self.shared else nullcontext():
            yield

    def load(self, policy: PeftModel, adapter: str | None) -> DiffusionPipeline:
        """The pipeline with one of the policy's adapters as plain diffusers loads it, or without; within [`~SampleModel.encoders`]."""
        pipeline = self.source.load_pipeline(**{name: getattr(self.backbone.pipeline, name) for name in self.shared})
        if adapter is not None:
            with TemporaryDirectory() as folder:
                weights = whole_lora(policy, adapter)
                self.backbone.save_lora(folder, weights, policy.peft_config[adapter])
                load_lora(pipeline, find_lora(folder), adapter)
        pipeline.to(self.backbone.device)
        if self.half_dtype is not None:  # as the Trainer runs the policy, whose predictions are float32
            denoiser = getattr(pipeline, self.backbone.denoiser_name)
            mixed = torch.autocast(self.backbone.device.type, self.half_dtype)(denoiser.forward)
            denoiser.forward = convert_outputs_to_fp32(mixed)
        return pipeline

    @contextmanager
    def lend(self, policy: PeftModel, adapter: str | None) -> Iterator[DiffusionPipeline]:
        """
        Lends the pipeline.

        Args:
            policy ([`~peft.PeftModel`]):
                The policy, not wrapped, which is afterwards as it was.
            adapter (`str` or `None`):
                The policy's adapter that is put on the pipeline's denoiser.

        Yields:
            [`~diffusers.DiffusionPipeline`]
        """
        with nullcontext() if is_sharded(policy) else frozen_on_cpu(policy), self.encoders():
            pipeline = self.load(policy, adapter)
            try:
                with in_float32(pipeline.vae):
                    yield pipeline
            finally:
                for name in (self.backbone.denoiser_name, *self.backbone.encoder_names):
                    vars(pipeline)[name] = FreedComponent(name)  # whoever still holds the pipeline
                clear_device_cache(garbage_collection=True)


def default_steps(backbone: Backbone, config: dict[str, Any]) -> int:
    """The number of sampling steps where none is asked for: of a distilled model that says that it is one, or of the pipeline's call."""
    own = default_argument(backbone.pipeline_class, "num_inference_steps")
    return backbone.sampling_defaults(config).get("num_inference_steps", own)


@contextmanager
def frozen_on_cpu(policy: torch.nn.Module) -> Iterator[None]:
    """Has what is not trained of a policy on the CPU while the context lasts, which rounds nothing."""
    placed = [(weight, weight.device) for weight in policy.parameters() if not weight.requires_grad]
    for weight, _ in placed:
        weight.data = weight.data.to("cpu")
    try:
        yield
    finally:
        for weight, device in placed:
            weight.data = weight.data.to(device)


def same_files(folder: Path, other: Path) -> bool:
    """Whether two components have the same weights, byte by byte, and the same configuration."""
    files, others = (sorted(path.name for path in each.glob("*.safetensors")) for each in (folder, other))
    if not files or files != others:
        return False
    own, config = (
        {
            key: value
            for key, value in json.loads((each / "config.json").read_text()).items()
            if key not in NOT_COMPARED
        }
        for each in (folder, other)
    )
    return own == config and all(filecmp.cmp(folder / file, other / file, shallow=False) for file in files)
