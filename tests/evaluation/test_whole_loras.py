# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A LoRA is evaluated whole or not at all."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.trainer.test_initial_lora import kohya, text_encoder_part
from trl_diffusion.evaluation.models import load_pipeline, resolve_model
from trl_diffusion.lora_files import LORA_WEIGHTS_NAME, read_tensors


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    for family in ("sd", "sdxl", *tiny.FLOWS):
        tiny.PIPELINES[family]().save_pretrained(root / family)
        save_lora(tiny.PIPELINES[family](), root / f"{family} lora")
    return {path.name: path for path in root.iterdir()}


def write(folder: Path, weights: dict[str, torch.Tensor], header: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / LORA_WEIGHTS_NAME, {"lora_adapter_metadata": json.dumps(header)} if header else None)
    return folder


def load(folders: dict[str, Path], lora: Path, family: str = "sd", negative: bool = False):
    base = str(folders[family])
    where = (base, None, str(lora)) if negative else (str(lora), base, None)
    return load_pipeline(resolve_model("m", *where), torch.float32, CPU)


def halves(name: str, rank: int = 4, size: int = 8) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, size), f"{name}.lora_B.weight": torch.ones(size, rank)}


def a_layer(weights: dict) -> str:
    return sorted(weights)[0].rpartition(".lora_")[0]


BROKEN: dict[str, tuple[Callable, str]] = {
    "A is missing": (lambda w, h: w.pop(f"{a_layer(w)}.lora_A.weight"), "lacks 1 tensors .*lora_A"),
    "B is missing": (lambda w, h: w.pop(f"{a_layer(w)}.lora_B.weight"), "lacks 1 tensors .*lora_B"),
    "a layer is missing": (
        lambda w, h: [w.pop(f"{a}.lora_{x}.weight") for a in [a_layer(w)] for x in "AB"],
        "lacks 1",
    ),
    "a layer too many": (lambda w, h: w.update(halves("unet.nope.to_q")), "2 of its .* no layer .*'nope.to_q.lora_A"),
    "a tensor too many": (lambda w, h: w.update({"unet.lora_thing": torch.ones(3)}), "1 of its .* belong to no layer"),
    "another component": (lambda w, h: w.update(halves("text_encoder_2.q_proj")), "is not for a .*text_encoder_2"),
    "a text encoder's layer too many": (
        lambda w, h: w.update(halves("text_encoder.text_model.encoder.layers.9.self_attn.q_proj", size=16)),
        "does not fit",
    ),
    "NaN": (lambda w, h: w[f"{a_layer(w)}.lora_A.weight"].fill_(float("nan")), "not finite, in 'unet"),
    "infinite": (lambda w, h: w[f"{a_layer(w)}.lora_B.weight"].fill_(float("inf")), "not finite, in 'unet"),
    "another rank": (lambda w, h: h.update({"unet.r": 8}), "does not fit"),
    "no strength": (lambda w, h: h.update({"unet.lora_alpha": 0}), "its strength at .* is 0.0"),
    "no number as strength": (lambda w, h: h.update({"unet.lora_alpha": float("nan")}), "its strength at .* is nan"),
}


@pytest.mark.parametrize("negative", [False, True], ids=["lora", "negative_lora"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path, folders, change, message, negative):
    """diffusers loads most of these in silence; here the error names file and tensor."""
    weights, header = read_tensors(folders["sd lora"] / LORA_WEIGHTS_NAME)
    change(weights, header)
    with pytest.raises(ValueError, match=f"The LoRA {tmp_path}.*{message}"):
        load(folders, write(tmp_path, weights, header), negative=negative)


@pytest.mark.parametrize("family", ["sd", "sdxl", *tiny.FLOWS])
def test_other_models(folders, family):
    """A LoRA loads on its own family, and on no other."""
    for other in ("sd", "sdxl", *tiny.FLOWS):
        if other == family:
            load(folders, folders[f"{family} lora"], other)
            continue
        with pytest.raises(ValueError, match=f"The LoRA {folders[f'{family} lora']}.* (does not fit|is not for)"):
            load(folders, folders[f"{family} lora"], other)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""], ids=["peft", "no prefix"])
def test_names_that_nobody_reads(tmp_path, folders, prefix):
    """Without the component's name, diffusers would load nothing and draw the base."""
    weights = load_file(folders["sd lora"] / LORA_WEIGHTS_NAME)
    weights = {key.replace("unet.", prefix, 1): weight for key, weight in weights.items()}
    with pytest.raises(ValueError, match="is not for a `StableDiffusionPipeline`"):
        load(folders, write(tmp_path, weights))


def test_without_header(tmp_path, folders, caplog):
    """Alpha is the rank then, as in diffusers, which is said."""
    with caplog.at_level(logging.WARNING):
        pipeline = load(folders, write(tmp_path, load_file(folders["sd lora"] / LORA_WEIGHTS_NAME)))
    assert {layer.scaling["evaluated"] for layer in pipeline.unet.modules() if isinstance(layer, LoraLayer)} == {1.0}
    assert "says nothing of its strength" in caplog.text


class TestKohya:
    def test_each_layer_has_its_own_strength(self, tmp_path, folders):
        """Which diffusers loses for layers of attention; text encoders are adapted too."""
        weights = kohya(folders["sd lora"])
        for key in weights:
            if key.endswith(".alpha"):
                weights[key] = torch.tensor(2.0 if "to_q" in key else 8.0)
        pipeline = load(folders, write(tmp_path, weights | text_encoder_part()))
        for name, layer in pipeline.unet.named_modules():
            if isinstance(layer, LoraLayer):
                assert layer.scaling["evaluated"] == (0.5 if "to_q" in name else 2.0)
        layers = [layer for layer in pipeline.text_encoder.modules() if isinstance(layer, LoraLayer)]
        assert [layer.scaling["evaluated"] for layer in layers] == [1.0] * 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop(next(key for key in w if key.endswith(".alpha"))), "whose strength is unknown"),
            (lambda w: w.pop(next(key for key in w if "lora_up" in key)), "does not convert"),
            (lambda w: w[next(key for key in w if "lora_up" in key)].fill_(float("nan")), "not finite"),
            (lambda w: w[next(key for key in w if key.endswith(".alpha"))].fill_(float("nan")), "not finite"),
            (
                lambda w: w.update(
                    {key.replace("alpha", "dora_scale"): torch.ones(8, 1) for key in list(w) if "alpha" in key}
                ),
                "tensors that diffusers leaves out .*dora_scale",
            ),
            (lambda w: w.update({"lora_unet_mid_block_proj_in.hada_w1_a": torch.ones(4, 4)}), "does not convert"),
        ],
        ids=["some alphas", "a half", "nan", "alpha nan", "dora", "loha"],
    )
    def test_broken_files(self, tmp_path, folders, change, message):
        """By name, in place of what diffusers leaves out or raises."""
        weights = kohya(folders["sd lora"])
        change(weights)
        with pytest.raises(ValueError, match=f"The LoRA {tmp_path}.*{message}"):
            load(folders, write(tmp_path, weights))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_dropout_ends_with_the_training(tmp_path, folders, family, negative):
    """A LoRA that was trained with dropout is drawn with without it."""
    weights, header = read_tensors(folders[f"{family} lora"] / LORA_WEIGHTS_NAME)
    name = "unet" if family == "sd" else "transformer"
    lora = write(tmp_path / "dropped", weights, header | {f"{name}.lora_dropout": 0.5})
    pipelines = [load(folders, each, family, negative) for each in (folders[f"{family} lora"], lora)]
    denoisers = [getattr(pipeline, name) for pipeline in pipelines]
    layers = [layer for layer in denoisers[1].modules() if isinstance(layer, LoraLayer)]
    assert {float(drop.p) for layer in layers for drop in layer.lora_dropout.values()} == {0.5}
    assert not any(module.training for module in denoisers[1].modules())
