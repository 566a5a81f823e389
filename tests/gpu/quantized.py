# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Bases of 4 and 8 bits through diffusers' own loader: right, resumable, and as large as computed.

`right` trains a LoRA on a tiny model: the first loss is ln 2, no bit of the base's matrices moves, a run that was stopped ends on
the weights of one that was not, and a LoRA on the 4-bit base has the losses of one on a base in full with the weights that the 4
bits stand for. `memory` loads SDXL with random weights, trains a step at 512 pixels, and compares what the denoiser and its LoRA hold
with what their shapes say. Without a GPU, diffusers' refusal to quantise is replaced, see `tests.quantized`: those are figures of
bitsandbytes' kernels for the CPU and of tensors, not of a GPU.
"""

import argparse
import math
import tempfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PrinterCallback

from tests import tiny
from tests.benchmark.arms import release
from tests.benchmark.models import build_pipeline, image_pairs
from tests.gpu.record import Record, figure, stage_args
from tests.quantized import KINDS, quantizing_on_the_cpu
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones.quantization import dequantized, quantized_layers
from trl_diffusion.trainer.lora import base_checksums


FAMILIES = ("sd", "sdxl", "sd3", "flux")
BLOCK, NESTED_BLOCK = 64, 256  # weights to a scale, scales to a scale of scales, as bitsandbytes has it
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # as in `tests.gpu.right`, for a step that repeats another one


def make_trainer(
    model, family: str, kind: str | None, precision: str, device: str, folder: Path, data=None, **settings
):
    """A trainer of three steps."""
    common = tiny.FAST | tiny.settings(tiny.PIPELINES[family]()) | {"beta": 100.0, "learning_rate": 1e-4}
    common |= {"bf16": precision == "bf16", "use_cpu": device == "cpu", "dataloader_num_workers": 0}
    common |= {"output_dir": str(folder), "activation_checkpointing": True, "num_inference_steps": 2} | settings
    common |= {"precompute_dir": str(folder / "cache")} if settings.get("precompute") else {}
    common |= {"model_init_kwargs": {"quantization_config": KINDS[kind]}} if kind else {}
    trainer = InstanceDPOTrainer(
        model, args=InstanceDPOConfig(**common), train_dataset=data or tiny.pairs(6), peft_config=tiny.lora(alpha=8)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def matrices(trainer) -> dict[str, int]:
    """Checksums of the base, without biases, whose type bitsandbytes changes."""
    return {name: value for name, value in base_checksums(trainer.policy).items() if not name.endswith("bias")}


def with_weights_of(trainer, family: str):
    """A pipeline in full with the weights that quantised ones stand for."""
    pipeline = tiny.PIPELINES[family]()
    denoiser = getattr(pipeline, trainer.backbone.denoiser_name)
    for name, layer in quantized_layers(trainer.policy).items():
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        denoiser.get_submodule(name).weight.data = dequantized(layer).float().cpu()
    return pipeline


def right(family: str, kind: str, precision: str, device: str) -> dict:
    """Three steps, stopped after two and resumed, and beside those of the weights that 4 bits stand for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny.PIPELINES[family]().save_pretrained(folder / "model")
            case = str(folder / "model"), family, kind, precision, device, folder
            saving = {"save_strategy": "steps", "save_steps": 2}
            whole = make_trainer(*case, **saving)
            before = matrices(whole)
            whole.train()
            losses, weights = tiny.losses(whole), tiny.weights(whole.policy)
            picture = torch.tensor(list(whole.sample(["a cat"])[0].tobytes()), dtype=torch.float32).std() > 1
            resumed = make_trainer(*case, **saving)
            resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            moved = tiny.max_difference(
                *(
                    {key: value for key, value in each.items() if "lora_" in key}
                    for each in (weights, tiny.weights(resumed.policy))
                )
            )
            result = {
                "losses": losses,
                "quantization": whole.backbone.quantization,
                "first_loss_is_ln_2": abs(losses[0] - math.log(2)) <= TOLERANCE[precision],
                "base_stays": matrices(whole) == before,
                "sample_is_picture": bool(picture),
                "resume_difference": max(moved, abs(tiny.losses(resumed)[-1] - losses[-1])),
            }
            if kind != "8":  # whose layers quantise their inputs too
                full = make_trainer(with_weights_of(whole, family), family, None, *case[3:])
                full.train()
                differences = [abs(a - b) for a, b in zip(losses, tiny.losses(full), strict=True)]
                result["difference_from_full"] = max(differences)
            return result
    finally:
        torch.use_deterministic_algorithms(False)


def computed_bytes(denoiser: torch.nn.Module, kind: str | None) -> int:
    """What a denoiser under a LoRA holds by its shapes: packed matrices, their scales, and all else as it is."""
    layers = {id(layer.weight): layer for layer in quantized_layers(denoiser).values()}
    total = 0
    for weight in denoiser.parameters():
        layer = layers.get(id(weight))
        if layer is None:
            total += weight.nbytes
            continue
        number = layer.in_features * layer.out_features
        if kind == "8":
            total += number + 4 * layer.out_features
            continue
        scales = math.ceil(number / BLOCK)
        total += math.ceil(number / 2)
        total += scales + 4 * math.ceil(scales / NESTED_BLOCK) if kind == "4-nested" else 4 * scales
    return total


def held_bytes(denoiser: torch.nn.Module) -> int:
    """What it holds by its tensors, without the tables that all layers have alike."""
    state = denoiser.state_dict()
    return sum(
        value.nbytes for name, value in state.items() if not name.endswith(("_map", "__nf4", "__fp4", "_format"))
    )


def memory(kind: str | None, model: str, device: str) -> dict:
    """What is on the device after loading, and at the peak of a step."""
    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = 32 if model == "tiny" else 512
        pipeline = tiny.sdxl_pipeline() if model == "tiny" else build_pipeline(model, device)
        pipeline.to(torch.bfloat16).save_pretrained(folder / "model")
        del pipeline
        release(device)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        data = tiny.pairs(6) if model == "tiny" else image_pairs([f"row-{index}" for index in range(6)], size)
        settings = {"precompute": True, "resolution": size, "per_device_train_batch_size": 1}
        trainer = make_trainer(str(folder / "model"), "sdxl", kind, "bf16", device, folder, data, **settings)
        held = torch.cuda.memory_allocated() - before if on_gpu else held_bytes(trainer.policy)
        computed = computed_bytes(trainer.policy, kind)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return {
            "losses": tiny.losses(trainer),
            "computed_gib": computed / 2**30,
            "held_gib": held / 2**30,
            "held_to_computed": held / computed,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        }


def cases(args: argparse.Namespace) -> list[dict]:
    """All cases, in the order of their worth."""
    if args.tiny:
        return [
            {"what": "right", "family": "sd3", "kind": "4", "precision": "fp32"},
            {"what": "right", "family": "sd", "kind": "8", "precision": "bf16"},
            {"what": "memory", "kind": "4-nested", "model": "tiny"},
        ]
    return [
        *({"what": "right", "family": "sd3", "kind": kind, "precision": "bf16"} for kind in KINDS),
        *({"what": "memory", "kind": kind, "model": "sdxl"} for kind in (None, *KINDS)),
        *(
            {"what": "right", "family": family, "kind": kind, "precision": precision}
            for precision in ("fp32", "bf16")
            for family in FAMILIES
            for kind in KINDS
            if (family, precision) != ("sd3", "bf16")
        ),
    ]


def figures(rows: list[dict]) -> list[dict]:
    found, good = [], [row for row in rows if "error" not in row]
    trained = [row for row in good if row["what"] == "right"]
    for name, what in (
        ("first_loss_is_ln_2", "quantised: first loss is ln 2"),
        ("base_stays", "quantised: no bit of the base moves"),
        ("sample_is_picture", "quantised: samples are pictures"),
    ):
        if trained:
            having = [row[name] for row in trained]
            found.append(figure(what, f"{sum(having)} of {len(having)}", "all", all(having)))
    if trained:
        worst = max(row["resume_difference"] for row in trained)
        found.append(figure("quantised: resumed from undisturbed", f"{worst:.1e}", "<= 1e-6", worst <= 1e-6))
    for precision, tolerance in TOLERANCE.items():
        beside = [
            row["difference_from_full"] for row in trained if row["precision"] == precision and row["kind"] != "8"
        ]
        if beside:
            what = f"quantised, {precision}: losses from those of the weights that 4 bits stand for"
            found.append(figure(what, f"{max(beside):.1e}", f"<= {tolerance:.2g}", max(beside) <= tolerance))
    for row in good:
        if row["what"] == "memory":
            kind = {"8": "8 bits", "4": "4 bits", "4-nested": "4 bits, nested", None: "bf16"}[row["kind"]]
            text = f"{row['held_gib']:.3f} GiB, computed {row['computed_gib']:.3f}"
            text += "" if row["peak_gib"] is None else f", at the peak of a step {row['peak_gib']:.2f}"
            aim = abs(row["held_to_computed"] - 1) <= 0.02
            found.append(figure(f"{row['model']}, denoiser and LoRA in {kind}", text, "held = computed, 2 %", aim))
    return found


def main() -> None:
    args = stage_args(__doc__)
    record = Record(args, figures)
    functions = {"right": right, "memory": memory}
    if find_spec("bitsandbytes") is None:
        for one in cases(args):
            record.skip(one, "bitsandbytes is not installed")
        return
    with nullcontext() if args.device == "cuda" else quantizing_on_the_cpu():
        for one in cases(args):
            settings = {name: value for name, value in one.items() if name != "what"}
            needs = 45 if one.get("model") == "sdxl" else 2.0
            function = functions[one["what"]]
            record.run(
                one, lambda function=function, settings=settings: function(**settings, device=args.device), needs
            )
            release(args.device)


if __name__ == "__main__":
    main()
