# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A LoRA for ComfyUI and A1111: diffusers reads the file as it reads the LoRA, and so does a naive reader of the keys."""

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests import tiny
from tests.test_lora_files import denoiser_name, save
from trl_diffusion import export_lora
from trl_diffusion.backbones import load_backbone
from trl_diffusion.cli.main import main


CONFIGS = {
    "alpha is twice the rank": {},
    "a third": {"r": 6, "lora_alpha": 2},
    "rank pattern": {"rank_pattern": {"to_q": 2}},
    "alpha pattern, by powers of two": {"alpha_pattern": {"to_out.0": 4}},
    "alpha pattern": {"alpha_pattern": {"to_out.0": 5}},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
}
CONVOLUTIONS = {"target_modules": ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "conv"]}


def prediction(family: str, path) -> torch.Tensor:
    pipeline, backbone = tiny.PIPELINES[family](), load_backbone(tiny.PIPELINES[family]())
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return tiny.predictions(backbone, getattr(pipeline, denoiser_name(pipeline)))


def is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, config) for family in ("sd", "sdxl", *tiny.FLOWS) for config in CONFIGS.values()]
    + [("sd", CONVOLUTIONS), ("sdxl", CONVOLUTIONS)],
    ids=[f"{family} {name}" for family in ("sd", "sdxl", *tiny.FLOWS) for name in CONFIGS]
    + ["sd convolutions", "sdxl convolutions"],
)
def test_diffusers_reads_the_same(tmp_path, family, config):
    """Difference 0; where a scale is in the weights, as in Stable Diffusion 3, up to float32 if it is no power of two."""
    if family == "sdxl" and config.get("target_modules") == "all-linear":
        config = {
            "target_modules": r".*(to_q|proj_in|ff\.net\.0\.proj|ff\.net\.2|time_emb_proj|time_embedding\.linear_1)"
        }
    model = save(tmp_path, family, **config)
    path = export_lora(tmp_path, tmp_path / "out" / "comfy.safetensors")
    before, after = prediction(family, tmp_path / "pytorch_lora_weights.safetensors"), prediction(family, path)
    scales = {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)}
    is_mixed = family.startswith("sd") and config.get("alpha_pattern") == {"to_out.0": 5}
    if is_mixed or (family == "sd3" and not all(map(is_power_of_two, scales))):
        assert (before - after).abs().max() < 1e-5
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["sd", "sdxl", *tiny.FLOWS])
@pytest.mark.parametrize("config", [CONFIGS["alpha pattern"], CONFIGS["rslora"]], ids=["alpha pattern", "rslora"])
def test_a_naive_reader(tmp_path, family, config):
    """As ComfyUI reads: the name of a layer out of its path in diffusers, the update `alpha / rank * up @ down`, no alpha meaning 1."""
    model = save(tmp_path, family, **config)
    tensors = load_file(export_lora(tmp_path, tmp_path / "comfy.safetensors"))
    halves = ("lora_up", "lora_down") if family.startswith("sd") and family != "sd3" else ("lora_B", "lora_A")
    read = set()
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        key = f"lora_unet_{name.replace('.', '_')}" if halves[0] == "lora_up" else f"transformer.{name}"
        up, down = (tensors[f"{key}.{half}.weight"].double() for half in halves)
        alpha = tensors.get(f"{key}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        read |= {f"{key}.{half}.weight" for half in halves} | ({f"{key}.alpha"} if alpha is not None else set())
        torch.testing.assert_close(
            (scale * up @ down).float(), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6
        )
    assert read == tensors.keys()
    assert (family == "sd3") != any(key.endswith(".alpha") for key in tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"lora_bias": True}, "with biases"),
        ({"target_modules": ["add_embedding.linear_1", "to_q"]}, "adapts 'add_embedding.linear_1'"),
    ],
    ids=["dora", "bias", "a name that is lost"],
)
def test_refused(tmp_path, config, message):
    """What these files have no place for."""
    save(tmp_path, "sdxl", **config)
    with pytest.raises(ValueError, match=message):
        export_lora(tmp_path, tmp_path / "comfy.safetensors")
    assert not (tmp_path / "comfy.safetensors").exists()


def test_outputs(tmp_path):
    """Neither a folder nor the LoRA itself is written over."""
    save(tmp_path)
    with pytest.raises(ValueError, match="must be a file that ends in .safetensors"):
        export_lora(tmp_path, tmp_path / "comfy")
    with pytest.raises(ValueError, match="is the LoRA itself"):
        export_lora(tmp_path, tmp_path / "pytorch_lora_weights.safetensors")


def test_the_command(tmp_path, capsys):
    """The LoRA stands alone or behind its flag; what is missing is said in one line."""
    save(tmp_path)
    file = str(tmp_path / "comfy.safetensors")
    for flags in ([str(tmp_path)], ["--lora", str(tmp_path)]):
        assert main(["export-lora", *flags, "--output", file]) == 0
        assert capsys.readouterr().out == f"Wrote {file}.\n"
    assert main(["export-lora", str(tmp_path)]) == 2
    assert "Name a LoRA and the new file" in capsys.readouterr().err
