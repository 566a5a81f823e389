# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Computes the memory of training every family, without running it.

    python -m tests.benchmark.memory [--only z_image ...] [--output FILE.json]

The library's own objectives, LoRA and frozen predictions run one batch of one row at true size on fake tensors, which have shapes and
types and no memory, while a dispatch mode adds up the storages that are alive. Gradients are there from the start, as while they are
accumulated. What does not bear on the activations is added by formula: the frozen base in bfloat16, or its linear layers in 8 bit
or in 4 (nf4, with or without nested scales) of bitsandbytes; the state of AdamW in 32 or 8 bit. Fake tensors are on the CPU here; what
autocast does differently on CUDA (norms in float32) is imitated, and attention is a fused one on both. A card must hold
`RESERVE_GIB` more, for the CUDA context, workspaces of libraries, and what the allocator loses.

With `--output`, families that the file already holds are kept, unless they are named by `--only`.
"""

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
from peft import LoraConfig
from torch.utils._pytree import tree_leaves

from tests.benchmark.families import FAMILIES, Family, empty_conditions, empty_latents
from tests.benchmark.live_bytes import GIB, LiveBytes, make_fake
from tests.benchmark.recipe import fake_tensors, make_policy, make_trainer
from trl_diffusion import ComplexPOConfig, ComplexPOTrainer, InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones.base import MAX_PIXELS
from trl_diffusion.process import DiscreteProcess, Process, RectifiedFlow
from trl_diffusion.trainer import policy as library_policy
from trl_diffusion.trainer.complex_po_trainer import ComplexPrompts
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer
from trl_diffusion.trainer.noised_batch import NoisedBatch
from trl_diffusion.trainer.reference import Reference, frozen_denoiser


CARDS_GB = (12, 16, 24, 48, 80)
RESERVE_GIB = 1.5
RESOLUTIONS = (512, 1024)
LORA_RANK = 64
PROMPTS_AT_ONCE = 8  # `per_device_eval_batch_size`
LARGEST_FULL = 7e9  # weights, of which all are trained: more fit no card of these
TRAINERS = {
    "iapo_lora": (InstanceDPOTrainer, InstanceDPOConfig),
    "cpo_s_lora": (ComplexPOTrainer, ComplexPOConfig),
    "iapo_all_weights": (InstanceDPOTrainer, InstanceDPOConfig),
}


# ----- what is trained -----


def make_backbone(family: Family) -> SimpleNamespace:
    """As much of a backbone as policy and objective ask for; its denoiser is on the meta device."""
    with torch.device("meta"):
        denoiser = family.make_denoiser()
    return SimpleNamespace(
        denoiser=denoiser, process=None, predict=family.predict, lora_target_modules=family.lora_target_modules
    )


def make_process(family: Family) -> Process:
    return RectifiedFlow() if family.is_flow else DiscreteProcess(torch.linspace(0.999, 0.005, 1000), "epsilon")


def make_full_policy(backbone: SimpleNamespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and reference where all weights are trained, as the library holds them for bfloat16."""
    with torch.device("meta"):
        reference = frozen_denoiser(copy.deepcopy(backbone.denoiser), torch.bfloat16)
        policy = library_policy.make_policy(backbone.denoiser, None, (), torch.bfloat16, seed=0)
    policy.activation_checkpointing_enable()
    return policy.train(), reference.train()


def make_trained(family: Family, recipe: str) -> DiffusionTrainer:
    """The trainer of a recipe, as much of it as its objective asks for, on the meta device."""
    trainer_class, config_class = TRAINERS[recipe]
    args = config_class(output_dir="unused", use_cpu=True)
    backbone = make_backbone(family)
    if recipe == "iapo_all_weights":
        model, reference = make_full_policy(backbone)
    else:
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
        model, reference = make_policy(backbone, config, has_expert=recipe == "cpo_s_lora"), None
    trainer = make_trainer(trainer_class, args, backbone, model)
    trainer.reference = Reference(reference, model)
    return trainer


def noised_batch(family: Family, trainer: DiffusionTrainer, resolution: int) -> NoisedBatch:
    """A batch of one row as precomputed training noises it."""
    rows = len(trainer.image_columns)
    latents, noise = (empty_latents(family, rows, resolution) for _ in range(2))
    timesteps = torch.empty(rows) if family.is_flow else torch.zeros(rows, dtype=torch.long)
    batch = {"conditions": empty_conditions(family, rows)}
    if isinstance(trainer, InstanceDPOTrainer):
        batch["masks"] = torch.empty(rows, *latents.shape[2:])
    else:
        batch["frozen_conditions"] = empty_conditions(family, 3 * rows)
        batch["prompts"] = ComplexPrompts([], [], [], torch.empty(rows), torch.empty(rows))
    return NoisedBatch(
        batch, latents, noise, trainer.process.add_noise(latents, noise, timesteps), timesteps, frozen={}
    )


# ----- what is counted -----


@contextmanager
def largest_inputs(linears: list[torch.nn.Linear], found: Counter):
    """Notes how many rows each linear layer was given at most while the context lasts."""

    def note(linear: torch.nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        found[linear] = max(found[linear], args[0].numel() // args[0].shape[-1])

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_batch(trainer: DiffusionTrainer, noised: NoisedBatch) -> None:
    """A batch's objective and backward; before it what is frozen, where that has more rows than the policy and may be the peak."""
    with torch.autocast("cpu", torch.bfloat16):
        frozen = {"ref_pred": torch.empty_like(noised.latents)}
        if isinstance(trainer, ComplexPOTrainer):
            frozen = trainer.frozen_predictions(trainer.model, noised)
        losses, _ = trainer.objective(trainer.model, noised._replace(frozen=frozen))
    losses.mean().backward()


def count_step(family: Family, trainer: DiffusionTrainer, resolution: int, linears: list[torch.nn.Linear]) -> dict:
    """
    GiB of gradients and activations at the peak of a batch's frozen forward, forward and backward; and what bitsandbytes takes
    beside it for a moment: in 4 bit the largest layer in bfloat16, in 8 bit the largest product in int32 with its input in int8.
    """
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.process = make_process(family)
    tracker, rows = LiveBytes(), Counter()
    for module in (trainer.model, trainer.reference.denoiser):
        for tensor in [] if module is None else [*module.parameters(), *module.buffers()]:
            tracker.put(tensor, "weights")
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        tracker.put(parameter.grad, "gradients")
    noised = noised_batch(family, trainer, resolution)
    for tensor in tree_leaves((tuple(noised), noised.batch)):
        if isinstance(tensor, torch.Tensor):
            tracker.put(tensor, "activations")
    tracker.peak = Counter()
    with tracker, largest_inputs(linears, rows):
        count_batch(trainer, noised)
    for parameter in trained:
        parameter.grad = None
    products = [num * (4 * linear.out_features + linear.in_features) for linear, num in rows.items()]
    weights = [2 * linear.weight.numel() for linear in rows]
    return {
        "gradients_gib": tracker.peak["gradients"] / GIB,
        "activations_gib": tracker.peak["activations"] / GIB,
        "momentary_gib": {"8bit": max(weights + products) / GIB, "nf4": max(weights) / GIB},
    }


def base_linears(denoiser: torch.nn.Module) -> list[torch.nn.Linear]:
    """The linear layers that bitsandbytes replaces: those of the base, but what diffusers keeps in float32."""
    kept = denoiser._keep_in_fp32_modules or []
    return [
        module
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not set(name.split(".")) & set(kept)
    ]


def quantized_bytes(linear: torch.nn.Linear, base: str) -> float:
    """Bytes of a layer's weights: 8 bit has a float32 scale a row; nf4 one in each 64 weights, or nested 8-bit ones."""
    num = linear.weight.numel()
    if base == "8bit":
        return num + 4 * linear.out_features
    scales = num / 64 * (4 if base == "nf4" else 1 + 4 / 256)
    return num / 2 + scales


def optimizer_bytes(trained: list[torch.nn.Parameter], bits: int) -> float:
    """Bytes of AdamW's two moments; those in 8 bit have a float32 scale in each 256, and small tensors stay in 32 bit."""
    of_one = [8 * p.numel() if bits == 32 or p.numel() < 4096 else 2 * p.numel() * (1 + 4 / 256) for p in trained]
    return sum(of_one)


def weight_gib(trainer: DiffusionTrainer, linears: list[torch.nn.Linear]) -> dict[str, float]:
    """GiB of all weights on the card, by the precision of the frozen base, or by whether there is a reference."""
    own, reference = (
        0 if module is None else sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
        for module in (trainer.model, trainer.reference.denoiser)
    )
    if reference:
        return {"with_reference": (own + reference) / GIB, "reference_precomputed": own / GIB}
    saved = {
        base: sum(2 * linear.weight.numel() - quantized_bytes(linear, base) for linear in linears)
        for base in ("8bit", "nf4", "nf4_nested")
    }
    return {"bf16": own / GIB} | {base: (own - bytes_saved) / GIB for base, bytes_saved in saved.items()}


def smallest_card(peak_gib: float) -> int | None:
    """The smallest card that a peak fits, in GB; `None` where none does."""
    return next((card for card in CARDS_GB if peak_gib + RESERVE_GIB <= card), None)


# ----- encoding -----


def count_encoding(family: Family) -> dict[str, float]:
    """
    GiB of the encoders' weights, and at the peak of encoding with all of them there and no denoiser: text in bfloat16, so many prompts
    at a time as `per_device_eval_batch_size`; images in float32, one of 1024 pixels a side at a time. With `offload_encoders` their
    largest layer takes the place of their weights. Also the activations of decoding such an image, for samples in training.
    """
    with torch.device("meta"):
        vae = family.make_vae().eval()
        text_encoders = [(make().to(torch.bfloat16).eval(), tokens) for make, tokens in family.make_text_encoders]
    tracker = LiveBytes()
    with fake_tensors(), torch.no_grad():
        for module in (vae, *(encoder for encoder, _ in text_encoders)):
            make_fake(module.requires_grad_(False))
            tracker.watch(module)
        with tracker:
            side = round(MAX_PIXELS**0.5)
            has_frames = isinstance(vae, diffusers.AutoencoderKLQwenImage)
            image, latents = torch.empty(1, 3, side, side), empty_latents(family, 1, side)
            vae.encode(image.unsqueeze(2) if has_frames else image)
            for encoder, tokens in text_encoders:
                ids = torch.zeros(PROMPTS_AT_ONCE, tokens, dtype=torch.long)
                encode_text(encoder, ids)
            encoding, tracker.peak = tracker.peak, Counter()
            vae.decode(latents.unsqueeze(2) if has_frames else latents)
    layers = [
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for model in (vae, *(encoder for encoder, _ in text_encoders))
        for module in model.modules()
    ]
    return {
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "text_encoder_parameters": sum(p.numel() for encoder, _ in text_encoders for p in encoder.parameters()),
        "weights_gib": encoding["weights"] / GIB,
        "activations_gib": encoding["activations"] / GIB,
        "largest_layer_gib": max(layers) / GIB,
        "decoding_gib": tracker.peak["activations"] / GIB,
    }


def encode_text(encoder: torch.nn.Module, ids: torch.Tensor) -> None:
    """All hidden states, of which pipelines take some; a language model's logits of the last token alone."""
    is_language_model = encoder.__class__.__name__.endswith(("CausalLM", "ConditionalGeneration"))
    settings = {"logits_to_keep": 1} if is_language_model else {}
    if not encoder.__class__.__name__.startswith(("CLIP", "T5")):
        settings["use_cache"] = False
    encoder(input_ids=ids, output_hidden_states=True, **settings)


# ----- the table -----


def count_recipe(
    family: Family, recipe: str, checkpointing: bool, resolutions: list[int]
) -> tuple[dict[str, object], list[dict]]:
    """What a family's recipe has on the card at all times, and what its steps take at some resolutions."""
    trainer = make_trained(family, recipe)
    denoiser = trainer.model.get_base_model() if recipe.endswith("lora") else trainer.model
    linears = base_linears(denoiser)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    always = {
        "trained_parameters": sum(p.numel() for p in trained),
        "weights_gib": weight_gib(trainer, linears),
        "optimizer_gib": {f"adamw_{bits}bit": optimizer_bytes(trained, bits) / GIB for bits in (32, 8)},
    }
    if not checkpointing:
        denoiser.disable_gradient_checkpointing()
    with fake_tensors():
        for module in (trainer.model, trainer.reference.denoiser):
            if module is not None:
                make_fake(module)
        steps = [
            {"resolution": side, "activation_checkpointing": checkpointing}
            | count_step(family, trainer, side, base_linears(denoiser))
            for side in resolutions
        ]
    return always, steps


def add_peaks(recipe: dict[str, object], encoding: dict[str, float]) -> None:
    """Adds up the parts of each step, by the precision of the base and the optimizer, and finds the smallest card."""
    encoding_peak = encoding["weights_gib"] + encoding["activations_gib"]
    offloaded_peak = encoding["largest_layer_gib"] + encoding["activations_gib"]
    for step in recipe["steps"]:
        step["peaks"] = {}
        for base, weights in recipe["weights_gib"].items():
            momentary = step["momentary_gib"].get(base.removesuffix("_nested"), 0)
            for optimizer, state in recipe["optimizer_gib"].items():
                always, passing = weights + state + step["gradients_gib"], step["activations_gib"] + momentary
                live = always + encoding["weights_gib"] + max(passing, encoding["activations_gib"])
                step["peaks"][f"{base}, {optimizer}"] = {
                    "training_gib": always + passing,
                    "training_card": smallest_card(always + passing),
                    "card": smallest_card(max(always + passing, encoding_peak)),
                    "card_offload_encoders": smallest_card(max(always + passing, offloaded_peak)),
                    "drawing_gib": weights + state + encoding["weights_gib"] + encoding["decoding_gib"],
                    "live_gib": live,
                    "live_card": smallest_card(live),
                }


def recipes_of(family: dict[str, object]) -> list[str]:
    """The recipes that are counted for a family: all weights are trained only where that fits a card."""
    return [recipe for recipe in TRAINERS if recipe.endswith("lora") or family["parameters"] < LARGEST_FULL]


def count(names: list[str], found: dict[str, dict], write: Callable[[], None]) -> None:
    """Counts what is missing of some families, steps with activation checkpointing first, and writes after each."""
    for name in names:
        if name not in found:
            denoiser = make_backbone(FAMILIES[name]).denoiser
            encoding = count_encoding(FAMILIES[name])
            encoding["card"] = smallest_card(encoding["weights_gib"] + encoding["activations_gib"])
            found[name] = {
                "model": FAMILIES[name].hub_id,
                "parameters": sum(p.numel() for p in denoiser.parameters()),
                "encoding": encoding,
                "recipes": {},
            }
            sample_model = 2 * found[name]["parameters"] / GIB  # in bfloat16, while what is trained waits on the CPU
            found[name]["drawing_with_sample_model_gib"] = (
                sample_model + encoding["weights_gib"] + encoding["decoding_gib"]
            )
    for checkpointing, recipe in product((True, False), TRAINERS):
        for name in names:
            if recipe in recipes_of(found[name]):
                known = found[name]["recipes"].setdefault(recipe, {"steps": []})
                done = [(step["resolution"], step["activation_checkpointing"]) for step in known["steps"]]
                missing = [side for side in RESOLUTIONS if (side, checkpointing) not in done]
                if missing:
                    start = time.monotonic()
                    always, steps = count_recipe(FAMILIES[name], recipe, checkpointing, missing)
                    known |= always
                    known["steps"] += steps
                    add_peaks(known, found[name]["encoding"])
                    write()
                    print(f"{name}, {recipe}, {checkpointing=}: {time.monotonic() - start:.0f} s", flush=True)


def table(found: dict[str, dict]) -> str:
    """Markdown: parts of a step of each LoRA in GiB, with activation checkpointing, and cards by the precision of the base."""
    bases = ("bf16", "8bit", "nf4")
    head = ["model", "recipe", "px", "weights bf16, 8 bit, nf4", "gradients", "AdamW, 8-bit AdamW", "activations"]
    lines = [
        "| " + " | ".join([*head, "peak", "card", "live: card"]) + " |",
        "|---" * (len(head) + 3) + "|",
    ]
    for family in found.values():
        for recipe, known in family["recipes"].items():
            for step in known["steps"]:
                if not recipe.endswith("lora") or not step["activation_checkpointing"]:
                    continue
                peaks = [step["peaks"][f"{base}, adamw_32bit"] for base in bases]
                cells = [
                    *(family["model"], recipe, str(step["resolution"])),
                    ", ".join(f"{known['weights_gib'][base]:.2f}" for base in bases),
                    f"{step['gradients_gib']:.2f}",
                    ", ".join(f"{size:.2f}" for size in known["optimizer_gib"].values()),
                    f"{step['activations_gib']:.2f}",
                    ", ".join(f"{peak['training_gib']:.1f}" for peak in peaks),
                    ", ".join(str(peak["card"] or "none") for peak in peaks),
                    ", ".join(str(peak["live_card"] or "none") for peak in peaks),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=FAMILIES, help="Families to count, anew; all that miss by default."
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, and to go on with.")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast
    transformers.logging.set_verbosity_error()
    found = {}
    if args.output and args.output.exists():
        found = json.loads(args.output.read_text())["families"]
    for name in args.only or []:
        found.pop(name, None)

    def write() -> None:
        if args.output:
            content = {
                "how": "computed on fake tensors, not measured; one row in a batch, bfloat16",
                "torch": torch.__version__,
                "reserve_gib": RESERVE_GIB,
                "cards_gb": CARDS_GB,
                "families": {name: found[name] for name in FAMILIES if name in found},
            }
            args.output.write_text(json.dumps(content, indent=1) + "\n")

    names = args.only or list(FAMILIES)
    count(names, found, write)
    print(f"\nComputed, not measured. GiB; cards in GB, with {RESERVE_GIB} GiB kept free:\n")
    print(table({name: found[name] for name in names}))


if __name__ == "__main__":
    main()
