# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch.profiler import ProfilerActivity, profile

from tests import tiny
from tests.benchmark import arms, memory
from tests.benchmark.__main__ import comparisons, parse_args, summary
from tests.benchmark.arms import ARMS, FLOOR_ARMS, Benchmark
from tests.benchmark.families import FAMILIES
from tests.benchmark.live_bytes import make_fake
from tests.gpu import flops


ROOT = Path(__file__).parents[1]


def run(module: str, *args: str) -> str:
    result = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_arm_is_broken(monkeypatch):
    """One step of one pair of each arm, on a toy model, asks the frozen models as often as its algorithm says."""
    monkeypatch.setattr(arms, "build_pipeline", lambda *args: tiny.sd_pipeline())
    args = parse_args(["--model", "tiny", "--device", "cpu", "--steps", "1", "--warmup", "0", "--lora_rank", "1"])
    benchmark = Benchmark(args)
    assert args.arms == ARMS
    results = {name: summary(name, benchmark.run(name), benchmark) for name in ARMS}
    # In the middle of the schedule: 6 steps of an inversion, of the published one too, and the reference where there is one
    inverting = {name: 7 for name in ARMS if name.startswith("inversion_") and ("policy" in name or "live" in name)}
    others = dict.fromkeys(ARMS, 0) | dict.fromkeys(
        [*FLOOR_ARMS, "full_live", "full_cached", "lora_live", "lora_cached", "diffusion_dpo"], 1
    )
    forwards = {name: result["no_grad_forwards_per_image"] for name, result in results.items()}
    assert forwards == others | inverting | {"inpo": 7}
    assert all(ratio > 0 for ratio in comparisons(results).values()) and len(comparisons(results)) == 16


def test_scripts_are_of_unets(capsys):
    """A model without a UNet has every arm but the scripts', and a script that is asked for is refused by name."""
    args = parse_args(["--model", "sd35_medium", "--device", "cpu"])
    assert set(ARMS) - set(args.arms) == {"diffusion_dpo", "inpo", "diffusers_lora"}
    with pytest.raises(SystemExit):
        parse_args(["--model", "sd35_medium", "--device", "cpu", "--arms", "floor", "inpo"])
    assert "`--model sd35_medium` has no arms inpo" in capsys.readouterr().err


@pytest.mark.slow
def test_every_arm_runs_on_the_tiny_model(tmp_path):
    """The command measures each arm, the forwards without gradient of each are what its algorithm needs, and JSON holds all."""
    out = run(
        "tests.benchmark", "--model", "tiny", "--device", "cpu", "--batch_size", "2", "--steps", "2",
        "--warmup", "0", "--output", str(tmp_path / "out.json"),
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    forwards = {result["arm"]: result["no_grad_forwards_per_image"] for result in found["results"]}
    # Timesteps 250 and 750: 3 and 8 steps of an inversion, 4 and 9 of the published one
    assert forwards == {
        "floor": 1, "floor_lora": 1, "full_live": 1, "full_cached": 1, "lora_live": 1, "lora_cached": 1,
        "full_ref_cached": 0, "lora_ref_cached": 0,
        "inversion_reference_live": 6.5, "inversion_reference_cached": 0, "inversion_reference_cached_lora": 0,
        "inversion_policy_live": 6.5, "inversion_policy_cached": 6.5, "inversion_policy_cached_lora": 6.5,
        "diffusion_dpo": 1, "inpo": 7.5, "diffusers_lora": 0,
    }  # fmt: skip
    assert all(f"| {arm} |" in out for arm in forwards)
    assert all(ratio > 0 for ratio in found["comparisons"].values()) and len(found["comparisons"]) == 16


# ----- memory on fake tensors -----

TINY_Z_IMAGE = dataclasses.replace(
    FAMILIES["z_image"],
    make_denoiser=lambda: ZImageTransformer2DModel(
        **{"dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 64}
    ),
    make_vae=lambda: AutoencoderKL(latent_channels=16, block_out_channels=(32,)),
    make_text_encoders=(),
    conditions={"prompt_embeds": (64, 64)},
)


def count_tiny(recipe: str, checkpointing: bool, is_fake: bool) -> tuple[float, float]:
    """Bytes at the peak of a batch, as counted, and as the allocator of the CPU gave them out (0 on fake tensors)."""
    trainer = memory.make_trained(TINY_Z_IMAGE, recipe)
    denoiser = trainer.model.get_base_model() if recipe.endswith("lora") else trainer.model
    if not checkpointing:
        denoiser.disable_gradient_checkpointing()
    with memory.fake_tensors() if is_fake else nullcontext():
        for module in (trainer.model, trainer.reference.denoiser):
            if module is not None:
                make_fake(module)
                if not is_fake:
                    for parameter in module.parameters():
                        parameter.data.normal_(std=0.02)
        # The first time makes tables of positions, which stay
        memory.count_step(TINY_Z_IMAGE, trainer, 128, memory.base_linears(denoiser))
        with nullcontext() if is_fake else profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step = memory.count_step(TINY_Z_IMAGE, trainer, 128, memory.base_linears(denoiser))
    counted = (step["gradients_gib"] + step["activations_gib"]) * 2**30
    if is_fake:
        return counted, 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return counted, max(accumulate(changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "checkpointing"), [("iapo_lora", True), ("cpo_s_lora", False), ("iapo_all_weights", True)]
)
def test_what_fake_tensors_would_take_is_what_the_allocator_gives(recipe, checkpointing):
    """
    A step's peak is counted alike on fake and on real tensors, but for small tables, and is the allocator's, but for what kernels
    take inside.
    """
    (fake, _), (real, allocated) = (count_tiny(recipe, checkpointing, is_fake) for is_fake in (True, False))
    assert fake == pytest.approx(real, rel=0.02)
    assert real <= allocated < 1.01 * real


def test_families_have_their_true_sizes():
    """The configurations have as many weights as the published models."""
    found = {}
    with torch.device("meta"):
        for name, family in FAMILIES.items():
            modules = family.make_denoiser(), *(make() for make, _ in family.make_text_encoders)
            found[name] = [sum(p.numel() for p in module.parameters()) for module in modules]
    clip_l, big_g, qwen3_4b = 123_650_304, 694_659_840, 4_022_468_096
    assert found == {
        "sd15": [859_520_964, 123_060_480],
        "sdxl": [2_567_463_684, 123_060_480, big_g],
        "sana_600m": [591_747_872, 2_614_341_888],
        "sana": [1_604_462_752, 2_614_341_888],
        "sd35_medium": [2_243_171_520, clip_l, big_g, 4_762_310_656],
        "flux2_klein_4b": [3_875_544_576, qwen3_4b],
        "z_image": [6_154_908_736, qwen3_4b],
        "sd35_large": [8_056_627_520, clip_l, big_g, 4_762_310_656],
        "flux2_klein_9b": [9_078_581_248, 8_190_735_360],
        "flux": [11_901_408_320, 123_060_480, 4_762_310_656],
        "krea2": [12_820_073_036, 4_437_815_808],
        "qwen_image": [20_430_401_088, 8_292_166_656],
        "flux2_dev": [32_223_281_152, 24_011_361_280],
    }


@pytest.mark.slow
def test_what_a_family_computes_is_counted():
    """A forward of Sana and of FLUX.1's 57 blocks is counted again as it stands in the table of the suite for a GPU."""
    for name, side in (("sana", 1024), ("flux", 512)):
        assert flops.count_forward(name, side) == pytest.approx(flops.FORWARD[name][side], rel=1e-5)


@pytest.mark.parametrize("base", ["nf4", "nf4_nested"])
def test_weights_of_4_bits_take_what_bitsandbytes_makes_of_them(base):
    """The formula gives the bytes of bitsandbytes' tensors; nested scales have a table of 1 KiB and an offset besides."""
    functional = pytest.importorskip("bitsandbytes.functional")
    linear = torch.nn.Linear(1024, 512)
    packed, state = functional.quantize_4bit(
        linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=base == "nf4_nested"
    )
    made = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert memory.quantized_bytes(linear, base) == made


def test_the_smallest_card_leaves_the_reserve_free():
    """10.5 GiB are the most that 12 GB hold beside the reserve of 1.5, and more than the largest card has fits none."""
    assert [memory.smallest_card(size) for size in (1, 10.5, 10.51, 78.5, 78.51)] == [12, 12, 16, 80, None]


def test_the_table_goes_on_where_it_was_left(monkeypatch):
    """What is known is not counted again, and each peak is the sum of its parts."""
    monkeypatch.setattr(memory, "FAMILIES", {"tiny": TINY_Z_IMAGE})
    monkeypatch.setattr(memory, "RESOLUTIONS", (128,))
    monkeypatch.setattr(memory, "TRAINERS", {"iapo_lora": memory.TRAINERS["iapo_lora"]})
    found, written = {}, []
    memory.count(["tiny"], found, lambda: written.append(json.dumps(found)))
    assert len(written) == 2  # with activation checkpointing and without it
    recipe = found["tiny"]["recipes"]["iapo_lora"]
    step, without = recipe["steps"]
    assert without["activations_gib"] > step["activations_gib"]
    parts = (recipe["weights_gib"]["nf4"], recipe["optimizer_gib"]["adamw_8bit"], step["gradients_gib"])
    peak = sum(parts) + step["activations_gib"] + step["momentary_gib"]["nf4"]
    assert step["peaks"]["nf4, adamw_8bit"]["training_gib"] == pytest.approx(peak, rel=1e-12)
    assert "| 128 |" in memory.table(found)

    left = json.loads(written[0])
    memory.count(["tiny"], left, lambda: written.append(json.dumps(left)))
    assert len(written) == 3 and left == json.loads(json.dumps(found))


@pytest.mark.slow
def test_the_table_of_memory_is_written_by_one_command(tmp_path):
    """The command counts a family at its true size: SD 1.5 with all weights has four bytes a weight and two of the reference."""
    run("tests.benchmark.memory", "--only", "sd15", "--output", str(tmp_path / "memory.json"))
    recipes = json.loads((tmp_path / "memory.json").read_text())["families"]["sd15"]["recipes"]
    assert set(recipes) == {"iapo_lora", "cpo_s_lora", "iapo_all_weights"}
    weights = recipes["iapo_all_weights"]["weights_gib"]["with_reference"]
    assert 6 * 859_520_964 / 2**30 < weights < 6.05 * 859_520_964 / 2**30
    assert all(len(recipe["steps"]) == 4 for recipe in recipes.values())
