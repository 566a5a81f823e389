# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The unconditional branch of a model with a negative LoRA is that of weights that are added up here by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.trainer.test_initial_lora import kohya, text_encoder_part
from trl_diffusion import negative_preference_guidance
from trl_diffusion.evaluation.models import guidance_of, load_pipeline, resolve_model
from trl_diffusion.lora_files import LORA_WEIGHTS_NAME, load_lora


FAMILIES = ("sd", "sdxl", "sd3")
CPU = torch.device("cpu")
# Of both LoRAs, neither alpha is the rank; they share some layers, and each has layers of its own
ALIGNED = {"seed": 1, "r": 4, "alpha": 8, "targets": ("to_q", "to_v")}
REVERSED = {"seed": 2, "r": 2, "alpha": 3, "targets": ("to_q", "to_k")}
SCALES = {"aligned": 8 / 4, "reversed": 3 / 2}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """A pipeline of a family, and two LoRAs for it."""
    root = tmp_path_factory.mktemp(request.param)
    make = tiny.PIPELINES[request.param]
    make().save_pretrained(root / "base")
    save_lora(make(), root / "aligned", **ALIGNED)
    save_lora(make(), root / "reversed", **REVERSED)
    return {name: root / name for name in ("base", "aligned", "reversed")}


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def add(denoiser: torch.nn.Module, folder: Path) -> None:
    """Adds `alpha / r * B @ A` to the weights."""
    weights = load_file(folder / LORA_WEIGHTS_NAME)
    for key, down in weights.items():
        name, half = key.split(".", 1)[1].split(".lora_")
        if half == "A.weight":
            up = weights[key.replace("lora_A", "lora_B")]
            denoiser.get_submodule(name).weight.data += SCALES[folder.name] * up @ down


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images[0]


def by_hand(folders: dict[str, Path], conditional: tuple[str, ...], unconditional: tuple[str, ...]) -> np.ndarray:
    """An image of two denoisers, whose weights are sums: the first half of each batch is the unconditional branch."""
    pipeline = DiffusionPipeline.from_pretrained(folders["base"])
    positive = denoiser_of(pipeline)
    negative = copy.deepcopy(positive)
    for denoiser, names in ((positive, conditional), (negative, unconditional)):
        for name in names:
            add(denoiser, folders[name])
    forward = positive.forward

    def both(*args, **kwargs):
        (first,), (second,) = (one(*args, **kwargs | {"return_dict": False}) for one in (negative.forward, forward))
        assert len(first) == 2
        return (torch.cat([first[:1], second[1:]]),)

    positive.forward = both
    return draw(pipeline)


@pytest.mark.parametrize(
    ("on", "unconditional"), [("aligned", ("aligned", "reversed")), ("base", ("reversed",))], ids=["aligned", "base"]
)
def test_the_sum_of_weights(folders, on, unconditional):
    """By default the base, the aligned LoRA and the reversed one; on the base alone, without the aligned one."""
    spec = resolve_model(
        *("m", str(folders["aligned"]), str(folders["base"]), str(folders["reversed"])), negative_lora_on=on
    )
    pipeline = load_pipeline(spec, torch.float32, CPU)
    with guidance_of(spec, pipeline):
        drawn = draw(pipeline)
    np.testing.assert_allclose(drawn, by_hand(folders, ("aligned",), unconditional), atol=2e-4)
    other = ("reversed",) if on == "aligned" else ("aligned", "reversed")
    assert abs(drawn - by_hand(folders, ("aligned",), other)).max() > 5e-3


@pytest.mark.parametrize("order", [("aligned", "reversed"), ("reversed", "aligned")])
def test_the_order_does_not_matter(folders, order):
    """Which adapter was loaded or named first is no difference, and afterwards the pipeline draws as before."""
    pipeline = DiffusionPipeline.from_pretrained(folders["base"])
    for name in order:
        load_lora(pipeline, folders[name] / LORA_WEIGHTS_NAME, name)
    state = [
        (layer.active_adapters, layer.disable_adapters, dict(layer.scaling))
        for layer in denoiser_of(pipeline).modules()
        if isinstance(layer, LoraLayer)
    ]
    before = draw(pipeline)
    with negative_preference_guidance(pipeline, "aligned", dict.fromkeys(order, 1.0)):
        drawn = draw(pipeline)
    np.testing.assert_allclose(drawn, by_hand(folders, ("aligned",), order), atol=2e-4)
    assert np.array_equal(draw(pipeline), before)
    assert state == [
        (layer.active_adapters, layer.disable_adapters, dict(layer.scaling))
        for layer in denoiser_of(pipeline).modules()
        if isinstance(layer, LoraLayer)
    ]


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory) -> dict[str, Path]:
    """A pipeline, two LoRAs of its denoiser, and one that adapts its text encoder too."""
    root = tmp_path_factory.mktemp("text_encoders")
    tiny.sd_pipeline().save_pretrained(root / "base")
    save_lora(tiny.sd_pipeline(), root / "reversed", seed=2)
    save_lora(tiny.sd_pipeline(), root / "plain", seed=1)
    (root / "both").mkdir()
    generator = torch.Generator().manual_seed(0)
    encoder = {
        key: weight if key.endswith(".alpha") else torch.randn(weight.shape, generator=generator)
        for key, weight in text_encoder_part().items()
    }
    save_file(kohya(root / "plain") | encoder, root / "both" / LORA_WEIGHTS_NAME)
    return {path.name: path for path in root.iterdir()}


class TestTextEncoders:
    """They encode the prompts of both branches at once."""

    def spec(self, folders, lora: str, negative: str, on: str = "aligned"):
        return resolve_model(
            *("m", str(folders[lora]), str(folders["base"]), str(folders[negative])), negative_lora_on=on
        )

    def test_of_the_aligned_lora(self, encoder_folders):
        """On top of it, both prompts are encoded with it, whatever was loaded later."""
        pipeline = load_pipeline(self.spec(encoder_folders, "both", "reversed"), torch.float32, CPU)
        alone = load_pipeline(
            resolve_model("m", str(encoder_folders["both"]), str(encoder_folders["base"])), torch.float32, CPU
        ).encode_prompt("a cat", CPU, 1, True, "blurred")
        base = DiffusionPipeline.from_pretrained(encoder_folders["base"]).encode_prompt(
            "a cat", CPU, 1, True, "blurred"
        )
        encoded = pipeline.encode_prompt("a cat", CPU, 1, True, "blurred")
        for mine, expected, other in zip(encoded, alone, base, strict=True):
            assert torch.equal(mine, expected) and (mine - other).abs().max() > 1e-2

    def test_what_would_act_in_the_wrong_branch(self, encoder_folders):
        """A text encoder's part of the negative LoRA, and one of the aligned LoRA where it is to be left out."""
        with pytest.raises(ValueError, match="both.* adapts a text encoder.* As `negative_lora`, name"):
            load_pipeline(self.spec(encoder_folders, "plain", "both"), torch.float32, CPU)
        with pytest.raises(ValueError, match="both.* adapts a text encoder.* Leave `negative_lora_on` out"):
            load_pipeline(self.spec(encoder_folders, "both", "reversed", "base"), torch.float32, CPU)
