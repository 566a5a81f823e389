# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Times training steps: this library's trainer, the least work that its objective needs, and three published scripts.

    python -m tests.benchmark --model sd15|sdxl|sd35_medium|tiny --device cpu|cuda [--arms full_cached diffusion_dpo ...]

Run it from the repository's root. Weights are random, their number is true, and so are the images' sizes. The trainer's
steps include reading and decoding the images; the scripts' steps start from decoded pixels. What is precomputed is computed
before the clock starts. Each step is followed by a floor, the forward and backward of the policy and the forward of the
reference and nothing else, and by a yardstick, one forward of a frozen denoiser: a slow moment of the machine slows all three.
Arms are compared in units of the yardstick. diffusers' script of a LoRA trains single images, with half of the objective's
forwards: its step has the images of as many pairs.
"""

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import datasets
import diffusers
import torch
import transformers

from tests.benchmark.arms import ARMS, FLOOR_ARMS, Benchmark, arms_of
from tests.benchmark.measure import Rounds
from tests.benchmark.models import TINY, TRUE_SIZE


COMPARISONS = [
    ("full_live", "full_cached"),
    ("lora_live", "lora_cached"),
    ("diffusion_dpo", "full_live"),
    ("diffusion_dpo", "full_cached"),
    ("diffusion_dpo", "full_ref_cached"),
    ("diffusion_dpo", "lora_cached"),
    ("diffusion_dpo", "lora_ref_cached"),
    ("diffusers_lora", "lora_live"),
    ("diffusers_lora", "lora_cached"),
    ("diffusers_lora", "lora_ref_cached"),
    ("inpo", "inversion_policy_live"),
    ("inpo", "inversion_policy_cached"),
    ("inpo", "inversion_policy_cached_lora"),
    ("inpo", "inversion_reference_live"),
    ("inpo", "inversion_reference_cached"),
    ("inpo", "inversion_reference_cached_lora"),
]
PACKAGES = ["torch", "diffusers", "peft", "trl", "transformers", "accelerate"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=[*TRUE_SIZE, *TINY], required=True, help="The tiny ones are the quickstart's."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True, help="Where to run.")
    parser.add_argument("--resolution", type=int, help="Side of the images in pixels; the model's own if left out.")
    parser.add_argument("--batch_size", type=int, default=1, help="Pairs in a micro batch.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro batches in a step.")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"{', '.join(ARMS)}; all that the model has if left out.",
    )
    parser.add_argument("--steps", type=int, default=10, help="Optimizer steps to measure, of each arm.")
    parser.add_argument("--warmup", type=int, help="Steps before these; 3 on a GPU, else 1.")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 (autocast) on a GPU, else fp32.")
    parser.add_argument("--activation_checkpointing", action="store_true", help="Recompute activations, in every arm.")
    parser.add_argument(
        "--optim", default="adamw_torch_fused", help="The optimizer, by `transformers`' name, of every arm."
    )
    parser.add_argument("--torch_compile", action="store_true", help="Compile the denoiser, in this library's arms.")
    parser.add_argument("--channels_last", action="store_true", help="Channels last, in this library's arms.")
    parser.add_argument("--lora_rank", type=int, default=64, help="Rank of the LoRA.")
    parser.add_argument("--output", type=Path, help="JSON file for all raw times.")
    args = parser.parse_args(argv)
    known = arms_of(args.model)
    args.arms = args.arms or known
    if unknown := [arm for arm in args.arms if arm not in known]:
        parser.error(f"`--model {args.model}` has no arms {', '.join(unknown)}: the published scripts train UNets.")
    if args.warmup is None:
        args.warmup = 3 if args.device == "cuda" else 1
    if args.dtype is None:
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    return args


def quieten() -> None:
    """No progress bars, and no warnings of casts."""
    diffusers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summary(name: str, rounds: Rounds, benchmark: Benchmark) -> dict[str, object]:
    """An arm's figures: medians over the rounds, peak memory without the yardstick's denoiser, raw seconds."""
    args = benchmark.args
    pairs = args.batch_size * args.gradient_accumulation_steps
    yardstick_bytes = sum(p.numel() * p.element_size() for p in benchmark.frozen.parameters())
    peak = None
    if None not in rounds.peak_memory:
        # The floor's reference is the yardstick's denoiser
        peak = max(rounds.peak_memory) - (0 if name in FLOOR_ARMS else yardstick_bytes)
    return {
        "arm": name,
        "pairs_per_second": pairs / statistics.median(rounds.arm),
        "ratio_to_floor": rounds.ratio_to_floor(),
        "ratio_to_yardstick": rounds.ratio_to_yardstick(),
        **{
            f"{what}_ms_per_pair": 1000 * statistics.median(getattr(rounds, what)) / pairs
            for what in ("arm", "floor", "yardstick")
        },
        "peak_memory_gib": None if peak is None else peak / 2**30,
        "no_grad_forwards_per_image": statistics.mean(rounds.no_grad_rows) / (2 * pairs),
        "seconds": {what: getattr(rounds, what) for what in ("arm", "floor", "yardstick")},
    }


def comparisons(results: dict[str, dict]) -> dict[str, float]:
    """How many times as long one arm takes as another, by the yardstick."""
    return {
        f"{slow} / {fast}": results[slow]["ratio_to_yardstick"] / results[fast]["ratio_to_yardstick"]
        for slow, fast in COMPARISONS
        if slow in results and fast in results
    }


def row(result: dict) -> str:
    peak = result["peak_memory_gib"]
    cells = [
        result["arm"],
        f"{result['pairs_per_second']:.3g}",
        f"{result['ratio_to_floor']:.3f}",
        *(f"{result[f'{what}_ms_per_pair']:.4g}" for what in ("arm", "floor", "yardstick")),
        "-" if peak is None else f"{peak:.2f}",
        f"{result['no_grad_forwards_per_image']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quieten()
    benchmark = Benchmark(args)
    setting = {
        "model": args.model,
        "resolution": benchmark.resolution,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "activation_checkpointing": args.activation_checkpointing,
        "torch_compile": args.torch_compile,
        "channels_last": args.channels_last,
        "optim": args.optim,
        "lora_rank": args.lora_rank,
        "steps": args.steps,
        "warmup": args.warmup,
        "timesteps": benchmark.timesteps,
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    print(json.dumps(setting), flush=True)
    print(
        "\n| arm | pairs/s | ratio to floor | ms per pair | floor, ms | yardstick, ms | peak GiB "
        "| forwards without gradient |\n|---|---|---|---|---|---|---|---|"
    )
    results = {}
    for name in args.arms:
        results[name] = summary(name, benchmark.run(name), benchmark)
        print(row(results[name]), flush=True)
    print(
        "\nPeak: during the arm's steps, without the yardstick's denoiser; on a GPU what PyTorch allocated, else the process. "
        "Forwards without gradient: of an image in a step; one is the reference's, the others are inversion.\n"
    )
    print("| time of A / time of B | |\n|---|---|")
    compared = comparisons(results)
    for pair, ratio in compared.items():
        print(f"| {pair} | {ratio:.2f} |")
    if args.output:
        args.output.write_text(
            json.dumps({"setting": setting, "results": list(results.values()), "comparisons": compared}, indent=2)
        )


if __name__ == "__main__":
    main()
