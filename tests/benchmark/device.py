# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a step, the VAE and a checkpoint cost, as this library does it and otherwise: `python -m tests.benchmark.device [--output FILE.json]`.

Random weights, one CPU thread. Times are medians of rounds that alternate between the ways, ratios those within a round; memory is
counted on the meta device, where tensors have shapes and no memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model

from tests import tiny
from tests.benchmark.live_bytes import LiveBytes
from tests.benchmark.models import sdxl_unet, vae
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import base, load_backbone
from trl_diffusion.trainer import checkpoints
from trl_diffusion.trainer.adapters import AdapterMixer, adapter_layers, with_adapter
from trl_diffusion.trainer.policy import training_mode


ROUNDS = 7
LORA = ["to_q", "to_k", "to_v", "to_out.0"]


def alternate(ways: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, and its ratio to the first."""
    times = {name: [] for name in ways}
    for round_ in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - start))
    first = times[next(iter(ways))]
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
        }
        for name, values in times.items()
    }


def with_expert(unet: UNet2DConditionModel, rank: int) -> PeftModel:
    config = LoraConfig(r=rank, target_modules=LORA)
    model = get_peft_model(unet.requires_grad_(False), config)
    model.add_adapter("expert", config)
    model.set_adapter("default")
    return model.train()


def frozen_forward() -> dict[str, object]:
    """CPO's frozen forward of a UNet with 320 adapted layers: rows of the expert and of the reference."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 5),
        norm_num_groups=4,
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
    )
    model = with_expert(unet, 8)
    mixer, size = AdapterMixer(model), 1
    latents, timesteps, text = torch.randn(3 * size, 4, 16, 16), torch.full((3 * size,), 500), torch.randn(3, 12, 64)

    def predict(denoiser, rows: slice = slice(None)):
        return denoiser(latents[rows], timesteps[rows], encoder_hidden_states=text[rows], return_dict=False)[0]

    def lists():
        model.eval()
        predict(partial(model, adapter_names=["expert"] * 2 * size + ["__base__"] * size))
        model.train()

    def two_forwards():
        for adapter, rows in (("expert", slice(0, 2 * size)), (None, slice(2 * size, None))):
            with with_adapter(mixer.layers, adapter):
                predict(model, rows)

    def slices():
        with mixer.mixing([("expert", 2 * size), (None, size)]):
            predict(model)

    with torch.no_grad():
        ways = {"lists of peft (before)": lists, "two forwards": two_forwards, "slices (now)": slices}
        return {"layers": len(mixer.layers), **alternate(ways)}


def modules() -> dict[str, object]:
    """What a step does for each module of SDXL with a LoRA and an expert, without any computation."""
    with torch.device("meta"):
        model = with_expert(sdxl_unet(), 64)
    layers = adapter_layers(model)

    def lend():
        with with_adapter(layers, None):
            pass

    result = {"modules": len(list(model.modules())), "adapted layers": len(layers)}
    before = {"train() (before)": model.train, "parameters() (before)": lambda: list(model.parameters())}
    result |= alternate(before | {"lend the reference": lend})
    with training_mode(model, True):
        now = {"train() (now)": model.train, "parameters() (now)": lambda: list(model.parameters())}
        result |= {name: {"ms": values["ms"]} for name, values in alternate(now).items()}
    return result


def images_at_once() -> dict[str, object]:
    """GiB that 16 images of 1024 pixels take at most while they are encoded, and what slices and bf16 change in the latents."""
    backbone, result = load_backbone(tiny.sd_pipeline()), {}
    with torch.device("meta"):
        backbone.pipeline.vae = vae(1024).eval()
    for name, max_pixels in (("all at once (before)", 16 * 1024**2), ("slices (now)", base.MAX_PIXELS)):
        tracker = LiveBytes()
        with torch.no_grad(), mock.patch.object(base, "MAX_PIXELS", max_pixels), tracker:
            backbone.encode_images(torch.empty(16, 3, 1024, 1024, device="meta"))
        result[f"{name}, GiB at most"] = tracker.peak.total() / 2**30
    torch.manual_seed(0)
    autoencoder: AutoencoderKL = vae(1024).eval()
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16), size=(128, 128), mode="bicubic") * 2 - 1
    images = (images.clamp(-1, 1) * 127.5).round() / 127.5
    backbone.pipeline.vae = autoencoder
    with torch.no_grad():
        exact, _ = backbone.encode_images(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = backbone.encode_images(images)
        noisy, _ = backbone.encode_images(images + (torch.rand_like(images) - 0.5) / 127.5)
        with mock.patch.object(base, "MAX_PIXELS", 1):
            sliced, _ = backbone.encode_images(images)
    size = exact.square().mean().sqrt()
    for name, other in (("slices", sliced), ("bf16", rounded), ("rounding of 8-bit pixels", noisy)):
        result[f"{name}, difference / size of the latents"] = ((other - exact).square().mean().sqrt() / size).item()
    return result


def checkpoint_bytes() -> dict[str, object]:
    """MiB on the disk of the weights in five checkpoints of all weights, of a pipeline whose encoders weigh more than its UNet."""
    result = {}
    refuse = mock.Mock(side_effect=OSError)
    for name, link in (("copies (before)", refuse), ("links (now)", checkpoints.os.link)):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(checkpoints.os, "link", link):
            settings = {**tiny.FAST, "max_steps": 5, "use_cpu": True, "save_strategy": "steps", "save_steps": 1}
            args = InstanceDPOConfig(folder, **settings)
            trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(10))
            trainer.train()
            files = [file.stat() for file in Path(folder).glob("checkpoint-*/*/*.safetensors")]
            result[name] = sum({file.st_ino: file.st_size for file in files}.values()) / 2**20
    return result


def adamw() -> dict[str, object]:
    """A step of AdamW on the matrices of a LoRA of rank 16."""
    ways = {}
    for name, setting in (
        ("one by one", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    ):
        parameters = [torch.nn.Parameter(torch.randn(16, 320)) for _ in range(560)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        ways[name] = torch.optim.AdamW(parameters, **setting).step
    return alternate(ways)


def compilation() -> dict[str, object]:
    """Seconds until the first prediction of a FLUX.1 of eight blocks of each kind, compiled as a whole and block by block."""
    result = {}
    for name in ("whole", "block by block"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=8,
            num_single_layers=8,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        start = time.perf_counter()
        if name == "whole":
            model.compile(backend="aot_eager")
        else:
            model.compile_repeated_blocks(backend="aot_eager")
        with torch.no_grad():
            model(
                hidden_states=torch.randn(1, 16, 16),
                encoder_hidden_states=torch.randn(1, 12, 32),
                pooled_projections=torch.randn(1, 16),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(12, 3),
            )
        result[name] = time.perf_counter() - start
    return result


PARTS = {
    "CPO's frozen forward": frozen_forward,
    "modules of SDXL": modules,
    "VAE": images_at_once,
    "checkpoints": checkpoint_bytes,
    "AdamW": adamw,
    "compilation, aot_eager": compilation,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; parts that are in it and not asked for stay.")
    parser.add_argument(
        "--parts", nargs="*", default=list(PARTS), choices=list(PARTS), help="Which parts; all by default."
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    results["torch"] = torch.__version__
    for title in args.parts:
        results[title] = PARTS[title]()
        print(f"\n{title}\n" + "\n".join(f"    {name}: {value}" for name, value in results[title].items()), flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
