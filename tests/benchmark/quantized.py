# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a LoRA on a quantised base keeps for the backward, beside one on a base in bfloat16. Bytes are counted, on a CPU:

python -m tests.benchmark.quantized [--output docs/source/benchmarks/quantized_activations.json]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.benchmark.__main__ import PACKAGES, device_name, quieten, version
from tests.quantized import KINDS, quantizing_on_the_cpu
from trl_diffusion.backbones import Backbone, load_backbone
from trl_diffusion.backbones.quantization import compute_as_autocast


BFLOAT16 = {"denoiser_dtype": torch.bfloat16, "encoder_dtype": torch.bfloat16}


def save_pipeline(folder: str) -> None:
    """FLUX.1 with 2 and 4 blocks of width 64, for which 256 positions of latents are much."""
    pipeline = tiny.flux_pipeline()
    pipeline.transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline.save_pretrained(folder)


def kept_bytes(backbone: Backbone) -> int:
    """Bytes of activations that a forward under a LoRA keeps, without activation checkpointing."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(backbone.lora_target_modules))
    policy = get_peft_model(backbone.denoiser.requires_grad_(False), config)
    backbone.max_sequence_length = tiny.NUM_T5_TOKENS
    with torch.no_grad():
        conditions = backbone.encode_prompts(["a cat", "a dog"])
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = backbone.predict(policy, latents, torch.tensor([10, 700]), conditions)
    assert prediction.requires_grad  # what is kept is alive until here
    return sum(number for place, number in storages.items() if place not in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    args = parser.parse_args()
    quieten()
    rows = []
    with tempfile.TemporaryDirectory() as folder, quantizing_on_the_cpu():
        save_pipeline(folder)
        for kind, is_cast in ((None, False), *((kind, is_cast) for kind in KINDS for is_cast in (False, True))):
            given = {"quantization_config": KINDS[kind]} if kind else {}
            backbone = load_backbone(folder, **BFLOAT16, **given)
            if is_cast:
                compute_as_autocast(backbone.denoiser)
            rows.append({"base": kind or "bf16", "inputs_are_cast": is_cast, "kept_mib": kept_bytes(backbone) / 2**20})
            print(rows[-1], flush=True)
    if args.output:
        setting = {"device": device_name("cpu"), "versions": {package: version(package) for package in PACKAGES}}
        args.output.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
