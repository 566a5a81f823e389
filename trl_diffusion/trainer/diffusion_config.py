# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig


@dataclass
class DiffusionConfig(_BaseConfig):
    r"""
    Parameters that the trainers of this library share. For those of every trainer see
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the model is given as a Hub
            id or a folder, such as `{"variant": "fp16", "revision": "..."}`.

        > Parameters that control the data preprocessing

        resolution (`int`, *optional*):
            Width and height in pixels of the training images. Defaults to what the denoiser was trained at.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop the middle of an image that is not square; else crop anywhere.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip each image left to right half of the time. Crops and flips are drawn for each image once, from the seed
            and the row's id.
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Probability of replacing a prompt by the empty one, which trains the branch that classifier-free guidance
            subtracts.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Train images at their own shape instead of as squares: at the nearest of several sizes with about as many pixels
            as `resolution` squared, see [`data.buckets.bucket_sizes`]. A batch holds one size; both images of a pair share
            theirs. In each epoch, rows that fill no batch of their size are left out. Not for streams.
        precompute (`bool`, *optional*, defaults to `False`):
            Before the training, encode each image and each prompt once, and keep the results in Arrow files. The encoders
            leave the GPU then. Pays where rows are trained on more than once, in epochs or in several runs. Not for streams.
        precompute_dir (`str`, *optional*):
            Folder of these files. Defaults to one in the cache of `datasets`.

        > Parameters that control the training

        channels_last (`bool`, *optional*, defaults to `False`):
            Lay the denoiser and the VAE out with the channels last, which convolutions in half precision prefer on a GPU.

        timestep_range (`list[int]`, *optional*):
            The timesteps to train on, as `[low, high]` with `high` excluded. Defaults to all.

        > Parameters that control the logging of samples

        sample_prompts (`list[str]`, *optional*):
            Prompts that base and policy draw side by side, from the same noise, before training and every `sample_steps`
            steps. The pictures go to `samples/` in the output directory and to the trackers of `report_to` among wandb,
            trackio and tensorboard.
        sample_steps (`int`, *optional*, defaults to `100`):
            Optimizer steps between two drawings.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps of these drawings.
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            Classifier-free guidance of these drawings.

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
    prompt_dropout: float = field(
        default=0.0, metadata={"help": "Probability of replacing a prompt by the empty one."}
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

    # Parameters that control the training
    channels_last: bool = field(
        default=False, metadata={"help": "Lay the denoiser and the VAE out with the channels last."}
    )
    timestep_range: list[int] | None = field(
        default=None,
        metadata={"help": "The timesteps to train on, as `low high` with `high` excluded. Defaults to all."},
    )

    # Parameters that control the logging of samples
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts that base and policy draw side by side, from the same noise, during training."},
    )
    sample_steps: int = field(default=100, metadata={"help": "Optimizer steps between two drawings."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps of these drawings."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Classifier-free guidance of these drawings."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True  # as in TRL, under the name that transformers does not warn of
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if torch.cuda.is_available() and not self.use_cpu else 0
        super().__post_init__()
        if self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # from pinned memory a batch is copied while the GPU works

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
        if self.sample_steps <= 0:
            raise ValueError(f"`sample_steps` must be at least 1, got {self.sample_steps}.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would drop the images and prompts, which no denoiser's forward names. "
                "Leave it off: columns that training does not need do no harm."
            )
