# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Time, memory and share of the peak of steps at true size with random weights, by `tests.benchmark`.

Each arm's step is followed by its floor, the forward and backward of the policy and the forward of the reference, and by a
yardstick, see there. The share of the peak is that of the denoiser's arithmetic, nothing counted twice that is computed twice
(activation checkpointing) and no encoder counted. A case that does not fit into memory is a row, and so is every other failure.
"""

import argparse
import statistics

from tests.benchmark.__main__ import parse_args, summary
from tests.benchmark.arms import Benchmark, release
from tests.gpu.flops import COUNTED, arm_tflop, count_tflop, share_of_peak
from tests.gpu.record import Record, figure, stage_args


CACHED = ["lora_cached", "full_cached"]
LORAS = ["lora_live", "lora_cached", "lora_ref_cached"]
# model, pairs in a batch, whether activations are recomputed, arms: in the order of their worth
RUNS = [
    ("sdxl", 4, True, ["lora_cached", "diffusers_lora", "lora_ref_cached"]),
    ("sd15", 8, False, ["lora_cached", "diffusers_lora", "full_cached"]),
    ("sdxl", 1, True, ["lora_cached"]),
    ("sd35_medium", 4, True, ["lora_cached"]),
    ("sdxl", 4, False, ["lora_cached"]),
    ("sdxl", 4, True, ["lora_live", "full_cached", "diffusion_dpo"]),
    (
        "sd15",
        8,
        False,
        ["diffusion_dpo", "lora_ref_cached", "lora_live", "full_live", "inpo", "inversion_policy_cached"],
    ),
    ("sdxl", 1, True, ["diffusers_lora", "full_cached"]),
    ("sd15", 1, False, ["lora_cached", "full_cached", "diffusers_lora"]),
    ("sd15", 4, False, ["lora_cached", "full_cached"]),
    ("sdxl", 8, True, ["lora_cached", "full_cached"]),
    ("sd35_medium", 1, True, ["lora_cached", "lora_live"]),
    ("sdxl", 4, True, ["full_live", "inpo"]),
    ("sd15", 16, False, ["lora_cached"]),
    ("sdxl", 16, True, ["lora_cached"]),
    ("sd15", 32, False, ["lora_cached"]),
    ("sd15", 64, False, ["lora_cached"]),
    ("sdxl", 32, True, ["lora_cached"]),
    ("sdxl", 8, False, ["lora_cached"]),
]
TINY_RUNS = [("tiny", 2, False, ["lora_cached", "diffusers_lora"]), ("tiny_flow", 1, True, ["lora_live"])]


def benchmark_args(model: str, batch_size: int, is_checkpointed: bool, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of `tests.benchmark`: few steps, since all are alike."""
    steps = ["--steps", "1", "--warmup", "0"] if args.tiny else ["--steps", "5", "--warmup", "2"]
    flags = ["--activation_checkpointing"] if is_checkpointed else []
    return parse_args(["--model", model, "--device", args.device, "--batch_size", str(batch_size), *steps, *flags])


class Runner:
    """Runs arms; the benchmark, which holds a denoiser for the yardstick, is made anew for each setting."""

    def __init__(self, args: argparse.Namespace, device: str):
        self.args, self.device = args, device
        self.setting, self.benchmark = None, None
        self.counts = dict(COUNTED)

    def run(self, setting: tuple[str, int, bool], arm: str) -> dict:
        if setting != self.setting:
            self.benchmark = self.setting = None  # before another takes its memory
            release(self.args.device)
            self.benchmark, self.setting = Benchmark(benchmark_args(*setting, self.args)), setting
        model, benchmark = setting[0], self.benchmark
        if model not in self.counts:
            lora = benchmark.lora(target_modules=list(benchmark.lora_target_modules))
            self.counts[model] = count_tflop(benchmark.frozen, benchmark.given, lora)
        result = summary(arm, benchmark.run(arm), benchmark)
        tflop = arm_tflop(arm, self.counts[model])
        seconds = statistics.median(result["seconds"]["arm"]) / benchmark.args.batch_size
        share = share_of_peak(tflop, seconds, self.device)
        return result | {
            "resolution": benchmark.resolution,
            "tflop_per_pair": tflop,
            "tflop_per_second": None if tflop is None else tflop / seconds,
            "share_of_peak": share,
        }


def did_not_fit(case: dict, rows: list[dict]) -> bool:
    """Whether a batch of the same kind that is not larger ran out of memory."""
    same = [row for row in rows if all(row[name] == case[name] for name in ("model", "is_checkpointed", "arm"))]
    return any(row.get("out_of_memory") and row["batch_size"] <= case["batch_size"] for row in same)


# ----- the aims -----


def beside_floor(rows: list[dict]) -> list[dict]:
    cached = [row for row in rows if row["arm"] in CACHED]
    if not cached:
        return []
    worst = max(cached, key=lambda row: row["ratio_to_floor"])
    typical = statistics.median(row["ratio_to_floor"] for row in cached)
    where = f"{worst['model']}, batch {worst['batch_size']}, {worst['arm']}"
    text = f"{typical:.3f} in the middle, {worst['ratio_to_floor']:.3f} at most ({where})"
    return [figure("cached step / floor", text, "<= 1.05", worst["ratio_to_floor"] <= 1.05)]


def peak_share(rows: list[dict], model: str, aim: float) -> list[dict]:
    """Of the model's best arm of a LoRA, at four samples or more."""
    loras = [row for row in rows if row["model"] == model and row["arm"] in LORAS and row["batch_size"] >= 2]
    if not loras:
        return []
    what, known = f"{model}, LoRA: share of the bf16 peak", [row for row in loras if row["share_of_peak"] is not None]
    if not known:
        best = max(loras, key=lambda row: row["tflop_per_second"])
        return [figure(what, f"unknown GPU; {best['tflop_per_second']:.3g} TFLOP/s", f">= {aim:.0%}")]
    best = max(known, key=lambda row: row["share_of_peak"])
    text = f"{best['share_of_peak']:.1%} ({best['arm']}, batch {best['batch_size']})"
    return [figure(what, text, f">= {aim:.0%}", best["share_of_peak"] >= aim)]


def memory(rows: list[dict]) -> list[dict]:
    known = [
        r for r in rows if r["model"] == "sdxl" and r["arm"] == "lora_cached" and r["peak_memory_gib"] is not None
    ]
    if not known:
        return []
    least = min(known, key=lambda row: row["peak_memory_gib"])
    gigabytes = least["peak_memory_gib"] * 2**30 / 1e9
    text = f"{gigabytes:.1f} GB (batch {least['batch_size']})"
    return [figure("SDXL, LoRA, 1024 px: peak memory of a step", text, "<= 12 GB", gigabytes <= 12)]


def beside_diffusers(rows: list[dict]) -> list[dict]:
    """How many times as long the script's step takes as this library's, of as many images."""
    ratios = {
        (ours["model"], ours["batch_size"], ours["arm"]): theirs["ratio_to_yardstick"] / ours["ratio_to_yardstick"]
        for theirs in rows
        for ours in rows
        if theirs["arm"] == "diffusers_lora"
        and ours["arm"] in LORAS
        and all(theirs[name] == ours[name] for name in ("model", "batch_size", "is_checkpointed"))
    }
    if not ratios:
        return []
    text = ", ".join(f"{model} batch {size} {arm} {ratio:.2f}" for (model, size, arm), ratio in ratios.items())
    return [figure("time of diffusers' LoRA script / ours", text, ">= 1.8", max(ratios.values()) >= 1.8)]


def figures(rows: list[dict]) -> list[dict]:
    measured = [row for row in rows if "error" not in row]
    found = beside_floor(measured)
    for model, aim in (("sdxl", 0.4), ("sd35_medium", 0.4), ("sd15", 0.25)):
        found += peak_share(measured, model, aim)
    found += memory(measured) + beside_diffusers(measured)
    if too_large := [row for row in rows if row.get("out_of_memory")]:
        text = ", ".join(f"{row['model']} batch {row['batch_size']} {row['arm']}" for row in too_large)
        found.append(figure("did not fit into memory", text))
    return found


def main() -> None:
    args = stage_args(__doc__)
    record = Record(args, figures)
    runner, needs = Runner(args, record.setting["device"]), 2 if args.tiny else 15
    for model, batch_size, is_checkpointed, arms in TINY_RUNS if args.tiny else RUNS:
        for arm in arms:
            case = {"model": model, "batch_size": batch_size, "is_checkpointed": is_checkpointed, "arm": arm}
            setting = model, batch_size, is_checkpointed
            if did_not_fit(case, record.rows):
                record.skip(case, "a smaller batch did not fit")
                continue
            record.run(case, lambda setting=setting, arm=arm: runner.run(setting, arm), needs)
            release(args.device)


if __name__ == "__main__":
    main()
