# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers.integrations.deepspeed import is_deepspeed_available, unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.generic import strtobool
from trl.trainer.base_config import _BaseConfig

from ..backbones import Backbone
from ..backbones.quantization import as_arguments
from ..data.buckets import bucket_sizes
from ..hub import NO_TOKEN, has_token


logger = get_logger(__name__)

DENSITY_SETTINGS = {"uniform": (), "logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}


@dataclass(repr=False)  # it shows no token
class DiffusionConfig(_BaseConfig):
    r"""
    Parameters that the trainers of this library share. For those of every trainer see
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the model is given as a Hub
            id, a folder or a single file, such as `{"variant": "fp16", "revision": "..."}`. `vae` names another VAE, and
            `config` the pipeline that gives a single file its configuration. `dtype` is a type, its name, or a `dict` of these by
            component. `quantization_config`, a [`~diffusers.PipelineQuantizationConfig`] or its arguments, holds the denoiser's frozen
            weights in 4 or 8 bits under a LoRA. Without `dtype`, mixed precision (`bf16`, `fp16`) also is the type of what stays frozen: of the text encoders,
            and of the denoiser under a LoRA. Everything else, the VAE too, is loaded in float32. Without mixed precision, a
            pipeline in half precision is cast to float32.
        initial_lora (`str`, *optional*):
            LoRA whose weights the training starts at: a folder or a Hub id with `pytorch_lora_weights.safetensors`, or a file; also
            one of another library, where diffusers converts its names and it holds its `.alpha` tensors. `peft_config` is then
            the LoRA's own, or must have the same rank, alpha and targets.
        initial_lora_in_reference (`bool`, *optional*, defaults to `True`):
            Whether this LoRA is a part of the reference too, where no `ref_model` is given: the reference is then the model before
            training, as without `initial_lora`. If off, it is the base without the LoRA.

        > Parameters that control the data preprocessing

        resolution (`int`, *optional*):
            Width and height in pixels of the training images. Defaults to what the denoiser was trained at.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop the middle of an image that is not square; else crop anywhere.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip each image left to right half of the time. Crops and flips are sampled for each image once, from the seed
            and the row's id.
        size_conditions (`str`, *optional*, defaults to `"target"`):
            What SDXL is told of an image's size and crop. `"target"`: the size that is trained at, uncropped, as the published
            Diffusion-DPO and InPO scripts do and as sampling does; `"original"` (ours): the size and the crop of each image.
            Other families have no such conditions.
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Probability of replacing a prompt by the unconditional branch of classifier-free guidance, as the pipeline makes
            it (for SDXL zeros, for Qwen-Image the encoding of a space, else that of the empty prompt).
        max_sequence_length (`int`, *optional*):
            Number of tokens that are read of a prompt, or that it is padded to, in training and in samples. Defaults to the
            pipeline's: 256 for Stable Diffusion 3, 512 for FLUX.1 (schnell was trained with 256), Qwen-Image and Krea 2. Fewer cost
            less; give the pipeline the same. Stable Diffusion 1, 2 and XL leave no choice.
        embedded_guidance (`float`, *optional*):
            The guidance scale that FLUX.1 dev and FLUX.2 dev are told in training. Defaults to 1, at which it predicts what an image of the data
            asks for; at the 3.5 that it is sampled with, its prediction is one of a guided model. Other models take none.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Train images at their own shape instead of as squares: at the nearest of several sizes with about as many pixels
            as `resolution` squared, see [`data.buckets.bucket_sizes`]. A batch holds one size; both images of a pair share
            theirs. In each epoch, rows that fill no batch of their size are left out. Not for streams.
        precompute (`bool`, *optional*, defaults to `False`):
            Before the training, encode each image and each prompt that it uses once, and keep the results in Arrow files. The
            encoders then leave the GPU: where the model is given by its name they are freed before the denoiser is loaded, and
            loaded again when they are needed. Worth it where rows are trained on more than once, in epochs or in several runs.
            Not for streams.
        precompute_dir (`str`, *optional*):
            Folder of these files. Defaults to one in the cache of `datasets`.
        precompute_dtype (`str`, *optional*, defaults to `"float32"`):
            What the latents of images are stored in: `"float16"` takes half the space, and rounds them by 0.05 % at most.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Keep VAE and text encoders in CPU memory and have them pass through the GPU layer by layer, by diffusers' group offloading:
            for encoders that do not fit. Slower and of the same numbers; encode once, with `precompute`.
        precompute_ref_preds (`bool`, *optional*, defaults to `False`):
            With `precompute`, also compute the predictions of the frozen models before the training, for the timestep and the
            noise of each row and epoch; a step then only runs the policy. Where the reference inverts, `precompute` alone
            does so.

        > Parameters that control the training

        channels_last (`bool`, *optional*, defaults to `False`):
            Lay the denoiser and the VAE out with the channels last, which convolutions in half precision prefer on a GPU.

        timestep_range (`list[int]`, *optional*):
            The timesteps to train on, as `[low, high]` with `high` excluded. Defaults to all.
        timestep_density (`str`, *optional*, defaults to `"uniform"`):
            The density that timesteps of a rectified flow are sampled from, before they are shifted as the pipeline shifts its
            schedule: `"uniform"` gives the timesteps that the pipeline samples images with; `"logit_normal"` and `"mode"` are
            those of SD3 (arXiv:2403.03206, section 3.1). Other models have uniform timesteps.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the logit-normal density. As in the paper, a mean above 0 favours the noise; diffusers' training scripts
            count from the other end.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the logit-normal density.
        mode_scale (`float`, *optional*, defaults to `1.29`):
            Scale of the mode density: above 0 it favours the middle, below 0 the ends.
        noise_source (`str`, *optional*, defaults to `"random"`):
            The noise of a noised image. `"random"` samples it, the same for all images of a row. `"inversion"` inverts each
            image to its timestep, with its prompt and without guidance, and takes the noise that explains the result, as InPO
            and, for SDXL, IAPO do.
        inversion_steps (`int`, *optional*, defaults to `10`):
            Number of steps of an inversion to the last timestep; earlier timesteps take fewer.
        inversion_model (`str`, *optional*, defaults to `"reference"`):
            The model that inverts: `"reference"`, whose results can be precomputed, or `"policy"`, as in InPO's published run.
        inversion_eta (`float`, *optional*, defaults to `0.0`):
            Weight of a random term after each step of an inversion; 0.1 in InPO's published run. 0 is deterministic.

        > Parameters that control the logging of samples

        sample_prompts (`list[str]`, *optional*):
            Prompts that are sampled with base and policy side by side, from the same noise, before training and every
            `sample_steps` steps. The pictures go to `samples/` in the output directory and to the trackers of `report_to`
            among wandb, trackio and tensorboard.
        sample_steps (`int`, *optional*, defaults to `100`):
            Optimizer steps between two such samplings.
        sample_model (`str`, *optional*):
            Another model that draws these images with the LoRA that is trained, and its base images without: a Hub id or a folder
            of a pipeline of the same architecture, such as a distilled version of what is trained. It is loaded to draw and
            freed after that. Where all weights are trained there is nothing that could be put on it.
        num_inference_steps (`int`, *optional*):
            Sampling steps of these images. Defaults to 25, with `sample_model` to those of its pipeline.
        guidance_scale (`float`, *optional*):
            Guidance of these images, as users of the pipeline write it. Defaults to the pipeline's.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing` (`gradient_checkpointing` in older versions): Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on a GPU that has it if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `dataloader_num_workers`: Defaults to `4` where there is a GPU, instead of `0`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    > - `ddp_find_unused_parameters`: Defaults to `False` instead of a search in every step: no denoiser leaves any unused.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`: a loss that is not finite stops the training.

    Raises:
        `ValueError`: If a parameter has a value that it cannot have, or two contradict each other; the message names the parameter and what it can be.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate of the optimizer."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of `activation_checkpointing`.", "nargs": "?", "const": True}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read images ahead; 4 where there is a GPU, else 0."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the denoiser's forward does not name. Leave it off."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without gradient in every step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Filter losses that are not finite out of the logs."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, used when the model is given as a Hub id "
            "or a folder."
        },
    )
    initial_lora: str | None = field(
        default=None,
        metadata={"help": "LoRA whose weights the training starts at: a folder, a Hub id or a file."},
    )
    initial_lora_in_reference: bool = field(
        default=True, metadata={"help": "Whether this LoRA is a part of the reference too, where no other is given."}
    )

    # Parameters that control the data preprocessing
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Width and height in pixels of the training images. Defaults to what the denoiser was trained at."
        },
    )
    center_crop: bool = field(
        default=True, metadata={"help": "Crop the middle of an image that is not square; else crop anywhere."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Flip each image left to right half of the time, boxes included."}
    )
    size_conditions: str = field(
        default="target",
        metadata={
            "help": "What SDXL is told of an image's size and crop: the size that is trained at, or each image's own.",
            "choices": ["target", "original"],
        },
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability of replacing a prompt by the unconditional branch of classifier-free guidance."
        },
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Number of tokens that are read of a prompt. Defaults to the pipeline's."},
    )
    embedded_guidance: float | None = field(
        default=None,
        metadata={"help": "The guidance scale that FLUX.1 dev and FLUX.2 dev are told in training. Defaults to 1."},
    )
    aspect_ratio_buckets: bool = field(
        default=False,
        metadata={
            "help": "Train images at the nearest of several shapes instead of as squares. A batch holds one shape."
        },
    )
    precompute: bool = field(
        default=False,
        metadata={
            "help": "Before the training, encode each image and each prompt once and keep the results in Arrow files."
        },
    )
    precompute_dir: str | None = field(
        default=None, metadata={"help": "Folder of these files. Defaults to one in the cache of `datasets`."}
    )
    precompute_dtype: str = field(
        default="float32",
        metadata={
            "help": "What the latents of images are stored in. float16 takes half the space.",
            "choices": ["float32", "float16"],
        },
    )
    offload_encoders: bool = field(
        default=False,
        metadata={
            "help": "Keep VAE and text encoders in CPU memory and have them pass through the GPU layer by layer."
        },
    )
    precompute_ref_preds: bool = field(
        default=False,
        metadata={"help": "With `precompute`, also compute the frozen models' predictions before the training."},
    )

    # Parameters that control the training
    channels_last: bool = field(
        default=False, metadata={"help": "Lay the denoiser and the VAE out with the channels last."}
    )
    timestep_range: list[int] | None = field(
        default=None,
        metadata={"help": "The timesteps to train on, as `low high` with `high` excluded. Defaults to all."},
    )

    timestep_density: str = field(
        default="uniform",
        metadata={
            "help": "The density of a rectified flow's timesteps before they are shifted as the pipeline's are.",
            "choices": ["uniform", "logit_normal", "mode"],
        },
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit-normal density."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit-normal density."})
    mode_scale: float = field(default=1.29, metadata={"help": "Scale of the mode density."})
    noise_source: str = field(
        default="random",
        metadata={
            "help": "The noise of a noised image: random, or from inversion of the image.",
            "choices": ["random", "inversion"],
        },
    )
    inversion_steps: int = field(
        default=10, metadata={"help": "Number of steps of an inversion to the last timestep; earlier ones take fewer."}
    )
    inversion_model: str = field(
        default="reference",
        metadata={
            "help": "The model that inverts: the reference, whose results can be precomputed, or the policy.",
            "choices": ["reference", "policy"],
        },
    )
    inversion_eta: float = field(
        default=0.0, metadata={"help": "Weight of a random term after each step of an inversion."}
    )

    # Parameters that control the logging of samples
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts that are sampled with base and policy side by side, from the same noise, in training."
        },
    )
    sample_steps: int = field(default=100, metadata={"help": "Optimizer steps between two such samplings."})
    sample_model: str | None = field(
        default=None,
        metadata={"help": "Another model that draws these images with the LoRA, such as a distilled version."},
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Sampling steps of these images. Defaults to 25, or those of `sample_model`."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of these images. Defaults to the pipeline's."}
    )

    def to_dict(self) -> dict[str, Any]:
        """The settings as trackers get them, without tokens."""
        settings = super().to_dict()
        if isinstance(kwargs := settings["model_init_kwargs"], dict):
            hidden = {name: f"<{name.upper()}>" for name in ("token", "use_auth_token", "proxies") if kwargs.get(name)}
            settings["model_init_kwargs"] = kwargs | hidden
        return settings

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __repr__ = __str__

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else each of the processes would train alone
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # which the flags come before
        forbids_bf16 = self.bf16 is False
        if self.bf16 is None:
            is_default = not self.fp16 and not self.use_cpu and launched != "fp16"
            self.bf16 = is_default and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True  # as in TRL, under the name that transformers does not warn of
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if torch.cuda.is_available() and not self.use_cpu else 0
        if (
            self.deepspeed or strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))
        ) and not is_deepspeed_available():
            raise ValueError(
                "This run asks for DeepSpeed, which is not installed. Install it with `pip install 'trl-diffusion[deepspeed]'`."
            )
        super().__post_init__()
        unset_hf_deepspeed_config()  # by which transformers would cut models, such as text encoders, where they are loaded
        if forbids_bf16 and self.mixed_precision == "bf16":
            self.mixed_precision = "no"
        self._n_gpu = min(self.n_gpu, 1)  # a process trains on one GPU: `nn.DataParallel` would cut its batches
        if isinstance(self.model_init_kwargs, dict) and self.model_init_kwargs.get("quantization_config") is not None:
            plain = as_arguments(self.model_init_kwargs["quantization_config"])  # as records of the run hold it
            self.model_init_kwargs = self.model_init_kwargs | {"quantization_config": plain}
        if self.push_to_hub and not has_token(self.hub_token):
            logger.warning(f"`push_to_hub` is set, and the push will fail. {NO_TOKEN}")
        resume = str(self.resume_from_checkpoint).lower()
        if resume in ("true", "false", "no", "none"):  # a command's flags and its YAML file say it in words
            self.resume_from_checkpoint = True if resume == "true" else None  # the last checkpoint, or none
        if self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # from pinned memory a batch is copied while the GPU works

        if self.sample_model is None and self.num_inference_steps is None:
            self.num_inference_steps = 25
        if self.sample_model is not None and not isinstance(self.sample_model, str):
            raise ValueError(
                f"`sample_model` is a `{type(self.sample_model).__name__}`: pass the name of a pipeline, a Hub id or a folder."
            )
        if self.resolution is not None and self.resolution <= 0:
            raise ValueError(f"`resolution` must be a positive number of pixels, got {self.resolution}.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"`prompt_dropout` is a probability, got {self.prompt_dropout}.")
        if self.timestep_range is not None:
            if len(self.timestep_range) != 2 or not 0 <= self.timestep_range[0] < self.timestep_range[1]:
                raise ValueError(
                    f"`timestep_range` must be two numbers with 0 <= low < high, got {self.timestep_range}. "
                    "Use `[0, 1000]` for all timesteps of Stable Diffusion."
                )
        for name, values in (
            ("size_conditions", ("target", "original")),
            ("timestep_density", ("uniform", "logit_normal", "mode")),
            ("precompute_dtype", ("float32", "float16")),
            ("noise_source", ("random", "inversion")),
            ("inversion_model", ("reference", "policy")),
        ):
            check_choice(self, name, values)
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= 1024:
            raise ValueError(
                f"`max_sequence_length` is {self.max_sequence_length}, and no pipeline takes more than 1024 tokens, or less than 1."
            )
        if not self.logit_std > 0:
            raise ValueError(f"`logit_std` is a standard deviation and must be above 0, got {self.logit_std}.")
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"`mode_scale` must lie between -1 and {2 / (math.pi - 2):.2f}, where the density is one, got {self.mode_scale}."
            )
        if self.inversion_steps < 1:
            raise ValueError(f"`inversion_steps` must be at least 1, got {self.inversion_steps}.")
        if not self.inversion_eta >= 0:
            raise ValueError(f"`inversion_eta` must not be negative, got {self.inversion_eta}.")
        if self.precompute_ref_preds and not self.precompute:
            raise ValueError(
                "`precompute_ref_preds=True` needs `precompute=True`, which encodes what the predictions are made from."
            )
        if self.precompute_ref_preds and self.noise_source == "inversion" and self.inversion_model == "policy":
            raise ValueError(
                "`precompute_ref_preds=True` is not possible where the policy inverts: the noised images then depend on the "
                "training. Use `inversion_model='reference'`, or leave it off."
            )
        if self.sample_steps <= 0:
            raise ValueError(f"`sample_steps` must be at least 1, got {self.sample_steps}.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would drop the images and prompts, which no denoiser's forward names. "
                "Leave it off: columns that training does not need do no harm."
            )

    def to_json_string(self) -> str:
        """The configuration as JSON, with the last part of each path only: TensorBoard stores it, and it is pushed."""
        return json.dumps(without_folders(self.to_dict()), indent=2)

    @property
    def reference_inverts(self) -> bool:
        """Whether noised images come from inversion by the reference."""
        return self.noise_source == "inversion" and self.inversion_model == "reference"

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy is the reference before training, where no other reference is given."""
        return self.initial_lora is None or self.initial_lora_in_reference

    @property
    def is_noised_by_epoch(self) -> bool:
        """Whether a row's noise depends on the epoch in place of the step, so that it is known before the training."""
        return self.noise_source == "inversion" or self.precompute_ref_preds

    def sampling_settings(self, resolution: int) -> dict[str, Any]:
        """The arguments of [`sampling.sample_images`] for the samples of a training."""
        return {
            "seed": self.seed,
            "batch_size": self.per_device_eval_batch_size,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "height": resolution,
            "width": resolution,
        }

    @property
    def half_dtype(self) -> torch.dtype | None:
        """The type of mixed precision, if any."""
        # Of the two parameters or of `accelerate launch`
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)


def is_absolute(value: Any) -> bool:
    """Whether a parameter is a path of this machine."""
    return isinstance(value, str | Path) and Path(value).is_absolute()


def without_folders(value: Any) -> Any:
    """The value, with the last part of each path of this machine, at any depth."""
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    is_path = (
        is_absolute(value)
        or isinstance(value, str)
        and (value.startswith(("~/", "./", "../")) or os.path.exists(value))
    )
    return Path(os.path.abspath(value)).name if is_path else value


def check_choice(args: DiffusionConfig, name: str, values: tuple[str, ...]) -> None:
    """Raises a `ValueError` where a parameter has none of the values that it can have."""
    if getattr(args, name) not in values:
        options = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
        raise ValueError(f"`{name}` must be {options}, got {getattr(args, name)!r}.")


def check_data_settings(args: DiffusionConfig, data_collator, train_dataset: Dataset | IterableDataset | None) -> None:
    """Raises a `ValueError` where settings need another collator or another dataset. Changes `args` where they leave it open."""
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`accelerator_config` has `dispatch_batches=True`, and the main process cannot cut batches that hold strings for the "
            "others. Leave it out: each process then reads its own rows."
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy` is {args.train_sampling_strategy!r}, which sorts rows by their length, and images have none. "
            "Use 'random', or `aspect_ratio_buckets` to sort images by their shape."
        )
    args.accelerator_config.dispatch_batches = False  # `None` would mean `True` for a stream
    if args.n_gpu > 1:
        logger.warning("Only one GPU is used. Train on several with `accelerate launch --multi_gpu`.")
        args._n_gpu = 1
    for setting in ("precompute", "aspect_ratio_buckets"):
        if getattr(args, setting) and data_collator is not None:
            raise ValueError(
                f"`{setting}` needs the trainer's own collator. Leave out `data_collator`, or train without `{setting}`."
            )
    if isinstance(train_dataset, IterableDataset) and args.aspect_ratio_buckets:
        raise ValueError(
            "`train_dataset` is a stream, whose rows cannot be sorted by size. Load it without `streaming=True`, or train "
            "without `aspect_ratio_buckets`."
        )


def configure_backbone(backbone: Backbone, args: DiffusionConfig) -> None:
    """Passes on what a backbone leaves to the run. Raises a `ValueError` where its family leaves no choice."""
    backbone.configure(args.max_sequence_length, args.embedded_guidance)
    settings = {name: getattr(args, name) for name in DENSITY_SETTINGS[args.timestep_density]}
    backbone.set_timestep_density(args.timestep_density, **settings)
    backbone.process.restrict(args.timestep_range)


def collator_settings(args: DiffusionConfig, resolution: int, backbone: Backbone) -> dict[str, Any]:
    """The arguments of [`data.collators.ImageCollator`] that a configuration gives."""
    return {
        "resolution": resolution,
        "center_crop": args.center_crop,
        "random_flip": args.random_flip,
        "seed": args.seed,
        "buckets": bucket_sizes(resolution, backbone.size_multiple) if args.aspect_ratio_buckets else None,
    }
