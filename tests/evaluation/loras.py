# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""LoRAs of random weights, as diffusers saves them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict


def save_lora(pipeline: DiffusionPipeline, folder: Path, seed: int = 0, size: float = 0.3, r: int = 4, alpha: int = 8):
    """Saves a LoRA of the pipeline's denoiser, which it carries afterwards; one of size 0 changes nothing."""
    model = get_peft_model(pipeline.unet, LoraConfig(r=r, lora_alpha=alpha, target_modules=["to_q", "to_v", "conv1"]))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name.removeprefix("base_model.model."): size * torch.randn(weight.shape, generator=generator)
        for name, weight in get_peft_model_state_dict(model).items()
    }
    pipeline.save_lora_weights(
        str(folder), unet_lora_layers=weights, unet_lora_adapter_metadata=model.peft_config["default"].to_dict()
    )
