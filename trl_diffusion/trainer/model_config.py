# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """
    The model and its LoRA, for scripts and the command line. The names are those of TRL's [`~trl.ModelConfig`].

    Parameters:
        model_name_or_path (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, or a single file or its link on the Hub.
        single_file_config (`str`, *optional*):
            Hub id or folder of the pipeline that gives a single file its configuration. Defaults to the original model on the Hub.
        vae (`str`, *optional*):
            The VAE in place of the pipeline's: Hub id or folder of a VAE or of a pipeline, or a single file.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline on the Hub.
        variant (`str`, *optional*):
            Variant of the weight files, such as `"fp16"`.
        use_peft (`bool`, *optional*, defaults to `False`):
            Train a LoRA instead of all weights. The commands of CPO set it to `True`.
        lora_r (`int`, *optional*, defaults to `64`):
            Rank of the LoRA.
        lora_alpha (`int`, *optional*, defaults to `64`):
            Alpha of the LoRA: its update is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the LoRA.
        lora_target_modules (`list[str]`, *optional*):
            Modules with a LoRA. Defaults to the attention projections of the denoiser.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Scale the LoRA's update by `lora_alpha / sqrt(lora_r)`.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Hold the denoiser's frozen weights in 8 bits under the LoRA.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Hold the denoiser's frozen weights in 4 bits under the LoRA.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            The 4-bit type: `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Also quantise the scales of 4-bit weights.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a diffusers pipeline, or a single file."}
    )
    single_file_config: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the pipeline that gives a single file its configuration."}
    )
    vae: str | None = field(
        default=None, metadata={"help": "The VAE in place of the pipeline's: a Hub id, a folder or a single file."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the pipeline on the Hub."}
    )
    variant: str | None = field(default=None, metadata={"help": "Variant of the weight files, such as 'fp16'."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA instead of all weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with a LoRA. Defaults to the attention projections of the denoiser."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale the LoRA by lora_alpha / sqrt(lora_r)."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the denoiser's frozen weights in 8 bits under the LoRA."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the denoiser's frozen weights in 4 bits under the LoRA."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "The type of 4-bit weights.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Also quantise the scales of 4-bit weights."})

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """
        The arguments of diffusers' `PipelineQuantizationConfig` that the flags describe, `None` without any. Raises a `ValueError` where
        they contradict each other.
        """
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`--load_in_4bit` and `--load_in_8bit`: a weight has 4 bits or 8. Give one of the two.")
        if not self.load_in_4bit and (self.use_bnb_nested_quant or self.bnb_4bit_quant_type != "nf4"):
            raise ValueError(
                "`--use_bnb_nested_quant` and `--bnb_4bit_quant_type` say how 4-bit weights are held, and there are none. Give "
                "`--load_in_4bit` too, or leave them out."
            )
        if self.load_in_8bit:
            return {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}
        if not self.load_in_4bit:
            return None
        settings = {
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
        }
        return {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True} | settings}
