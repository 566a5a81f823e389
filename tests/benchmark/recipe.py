# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Computes what a recipe for a flow model needs, without running it.

    python -m tests.benchmark.recipe examples/configs/cpo_flux.yaml [more.yaml ...] [--output FILE.json]

The models have their true sizes and no weights: tensors are fake, with shapes and types and no memory. What is run on them is
the library's own: the backbone's call, the LoRA, the frozen predictions and the objective of the recipe's trainer, AdamW. Memory
is counted as in `tests.benchmark.memory`, in the two phases of a recipe with `precompute`: encoders first, then the training.
TFLOP are counted by PyTorch's counter: those of matrix products, convolutions and attention.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmark import models
from tests.benchmark.live_bytes import GIB, PARTS, LiveBytes, float_norm, make_fake
from trl_diffusion import AttributeSFTTrainer, ComplexPOTrainer, InstanceDPOTrainer
from trl_diffusion.backbones import Backbone, backbone_class_of
from trl_diffusion.trainer import lora, policy
from trl_diffusion.trainer.adapters import AdapterMixer
from trl_diffusion.trainer.complex_po_trainer import ComplexPrompts
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer
from trl_diffusion.trainer.noised_batch import NoisedBatch
from trl_diffusion.trainer.reference import Reference


PIPELINES = {
    "stabilityai/stable-diffusion-3.5-medium": models.sd35_medium_pipeline,
    "stabilityai/stable-diffusion-3.5-large": models.sd35_large_pipeline,
    "black-forest-labs/FLUX.1-dev": models.flux_dev_pipeline,
}
TRAINERS = {
    "instance-dpo": InstanceDPOTrainer,
    "attribute-sft": AttributeSFTTrainer,
    "complex-po": ComplexPOTrainer,
}


# ----- what a recipe trains -----


def read_recipe(path: Path) -> tuple[type[DiffusionTrainer], dict[str, object]]:
    """The trainer and the settings of a recipe."""
    text = path.read_text()
    return TRAINERS[re.search(r"trl-diffusion (\S+) --config", text)[1]], yaml.safe_load(text)


def make_backbone(make_pipeline: Callable[[], DiffusionPipeline]) -> Backbone:
    """A backbone whose pipeline has no weights, its text encoders in bfloat16, as they are loaded."""
    with torch.device("meta"):
        pipeline = make_pipeline()
    backbone = backbone_class_of(pipeline)(pipeline)
    for name in backbone.text_encoder_names:
        getattr(pipeline, name).to(torch.bfloat16)
    return backbone


def make_policy(backbone: Backbone, peft_config: LoraConfig, has_expert: bool) -> PeftModel:
    """The policy as the library makes it for bfloat16, without weights; with a second, frozen LoRA if there is an expert."""
    # Checksums of the base need its weights
    with (
        torch.device("meta"),
        mock.patch.object(policy, "base_checksums", lambda denoiser: {}),
        mock.patch.object(lora, "base_checksums", lambda denoiser: {}),
    ):
        made = policy.make_policy(backbone.denoiser, peft_config, backbone.lora_target_modules, torch.bfloat16, seed=0)
        if has_expert:
            made.add_adapter("expert", made.peft_config["default"])
            made.set_adapter("default")
            for name, parameter in made.named_parameters():
                if ".expert." in name:
                    parameter.requires_grad_(False)
    made.base_model.model.activation_checkpointing_enable()
    return made.train()


def make_trainer(trainer_class: type[DiffusionTrainer], args: object, backbone: Backbone, model: PeftModel):
    """As much of a trainer as its objective asks for."""
    trainer = object.__new__(trainer_class)
    trainer.args, trainer.backbone, trainer.process = args, backbone, backbone.process
    trainer.model, trainer.reference = model, Reference(None, model)
    if trainer_class is ComplexPOTrainer:
        trainer.mixer, trainer.expert, trainer.is_degraded = AdapterMixer(model), "the adapter", False
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model, **kwargs: model)
    trainer.state = SimpleNamespace(global_step=1)  # in the first, values would be compared
    return trainer


def noised_batch(trainer: DiffusionTrainer, batch_size: int, resolution: int) -> NoisedBatch:
    """A batch of rows as precomputed training noises it: float32, but for the text conditions. The encoders must be fake."""
    backbone, rows = trainer.backbone, len(trainer.image_columns) * batch_size
    side = resolution // backbone.vae_scale_factor
    latents, noise = (torch.empty(rows, backbone.pipeline.vae.config.latent_channels, side, side) for _ in range(2))
    timesteps = torch.empty(rows)

    def conditions(num: int) -> dict[str, torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return backbone.encode_prompts([""] * num)

    batch = {"conditions": conditions(rows)}
    if isinstance(trainer, InstanceDPOTrainer):
        batch["masks"] = torch.empty(rows, side, side)
    if isinstance(trainer, ComplexPOTrainer):
        copies = 3 if trainer.args.target_strength == 1 else 4
        batch["frozen_conditions"] = conditions(copies * rows)
        batch["prompts"] = ComplexPrompts([], [], [], torch.empty(rows), torch.empty(rows))
    return NoisedBatch(
        batch, latents, noise, trainer.process.add_noise(latents, noise, timesteps), timesteps, frozen={}
    )


def make_encoders_fake(backbone: Backbone) -> None:
    for name in backbone.encoder_names:
        make_fake(getattr(backbone.pipeline, name))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without memory, on a CPU that computes norms as CUDA's autocast does: in float32."""
    norms = ("group_norm", "layer_norm", "rms_norm")
    patches = [mock.patch.object(F, name, float_norm(getattr(F, name))) for name in norms]
    with FakeTensorMode(), patches[0], patches[1], patches[2]:
        yield


# ----- counting -----


def micro_step(trainer: DiffusionTrainer, noised: NoisedBatch) -> None:
    """Frozen predictions, objective and backward of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        noised = noised._replace(frozen=trainer.frozen_predictions(trainer.model, noised))
        losses, _ = trainer.objective(trainer.model, noised)
    losses.mean().backward()


def training_gib(trainer: DiffusionTrainer, noised: NoisedBatch) -> dict[str, float]:
    """GiB of each part at the peak of a step, when the optimizer has its state."""
    tracker = LiveBytes()
    tracker.watch(trainer.model)
    for tensor in tree_leaves((tuple(noised), noised.batch)):
        if isinstance(tensor, torch.Tensor):
            tracker.put(tensor, "activations")
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], foreach=True)
    with tracker:
        for _ in range(2):
            tracker.peak = Counter()
            micro_step(trainer, noised)
            optimizer.step()
            optimizer.zero_grad()
            for tensor in tree_leaves(optimizer.state_dict()):
                if isinstance(tensor, torch.Tensor):
                    tracker.put(tensor, "optimizer")
    return {part: tracker.peak[part] / GIB for part in PARTS}


def encoding_gib(backbone: Backbone, num_rows: int, resolution: int) -> dict[str, float]:
    """GiB of the encoders' weights, and of what encoding a batch of images or prompts takes beside them at its peak."""
    tracker = LiveBytes()
    for name in backbone.encoder_names:
        tracker.watch(getattr(backbone.pipeline, name))
    with tracker, torch.no_grad():
        backbone.encode_images(torch.empty(num_rows, 3, resolution, resolution))
        with torch.autocast("cpu", torch.bfloat16):
            backbone.encode_prompts([""] * num_rows)
    return {part: tracker.peak[part] / GIB for part in ("weights", "activations")}


def tflop(run: Callable[[], object]) -> float:
    """What a call computes. The counter knows no fused attention of the CPU, so it is written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def compute(path: Path, **changes: object) -> dict[str, object]:
    """All figures of a recipe, or of what it becomes by changes."""
    trainer_class, settings = read_recipe(path)
    settings |= {name: value for name, value in changes.items() if value is not None}
    backbone = make_backbone(PIPELINES[settings["model_name_or_path"]])
    backbone.configure(settings.get("max_sequence_length"), settings.get("embedded_guidance"))
    resolution, batch_size = settings["resolution"], settings["per_device_train_batch_size"]
    fields = trainer_class.config_class.__dataclass_fields__
    known = {name: value for name, value in settings.items() if name in fields and name != "bf16"}
    args = trainer_class.config_class(**known, use_cpu=True)
    sizes = {
        name: sum(p.numel() for p in getattr(backbone.pipeline, name).parameters())
        for name in (*backbone.encoder_names, backbone.denoiser_name)
    }
    peft_config = LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"])
    model = make_policy(backbone, peft_config, has_expert=trainer_class is ComplexPOTrainer)
    with fake_tensors():
        make_encoders_fake(backbone)
        encoding = encoding_gib(backbone, args.per_device_eval_batch_size, resolution)
        make_fake(model)
        trainer = make_trainer(trainer_class, args, backbone, model)
        noised = noised_batch(trainer, batch_size, resolution)
        training = training_gib(trainer, noised)
        first = {name: value[:1] for name, value in noised.batch["conditions"].items()}
        with trainer.reference.lend(model) as base, torch.autocast("cpu", torch.bfloat16):
            forward = tflop(lambda: backbone.predict(base, noised.noisy_latents[:1], noised.timesteps[:1], first))
        step = tflop(lambda: micro_step(trainer, noised))
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if getattr(args, "attribute_dropout", 0) > 0:
        # Prompts change in every step, so that text encoders stay
        stays = sum(size for name, size in sizes.items() if name in backbone.text_encoder_names)
        training["weights"] += 2 * stays / GIB
    return {
        "recipe": path.name,
        "model": settings["model_name_or_path"],
        "parameters": sizes,
        "trained_parameters": num_trained,
        "resolution": resolution,
        "batch_size": batch_size,
        "text_tokens": noised.batch["conditions"]["prompt_embeds"].shape[1],
        "encoding_gib": encoding | {"total": sum(encoding.values())},
        "training_gib": training | {"total": sum(training.values())},
        "forward_tflop": forward,
        "tflop_per_row": step / batch_size,
        "how": "computed on fake tensors, not measured",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, help="YAML files.")
    parser.add_argument("--model_name_or_path", choices=PIPELINES, help="Another model for the recipes.")
    parser.add_argument("--per_device_train_batch_size", type=int, help="Another batch size for the recipes.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast
    changes = {name: getattr(args, name) for name in ("model_name_or_path", "per_device_train_batch_size")}
    results = [compute(path, **changes) for path in args.recipes]
    print("Computed, not measured. GiB at the peak:\n")
    print(f"| recipe | encoding: weights, activations | training: {', '.join(PARTS)} | sum |\n|---|---|---|---|")
    for result in results:
        encoding, training = result["encoding_gib"], result["training_gib"]
        cells = [f"{encoding[part]:.2f}" for part in ("weights", "activations")], [f"{training[p]:.2f}" for p in PARTS]
        print(f"| {result['recipe']} | {', '.join(cells[0])} | {', '.join(cells[1])} | {training['total']:.2f} |")
    print(
        "\n| recipe | weights trained | TFLOP of a forward of the base on one image | TFLOP of a row's share in a step |\n|---|---|---|---|"
    )
    for result in results:
        print(
            f"| {result['recipe']} | {result['trained_parameters']:,} | {result['forward_tflop']:.1f} "
            f"| {result['tflop_per_row']:.1f} |"
        )
    if args.output:
        args.output.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
