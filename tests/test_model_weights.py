# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A pipeline whose files hold other weights than its models have is refused, wherever it comes in."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone, load_pipeline
from trl_diffusion.evaluation import models


UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a pipeline of each family."""
    root = tmp_path_factory.mktemp("models")
    for family, make in tiny.PIPELINES.items():
        make().save_pretrained(root / family)
    return {family: root / family for family in tiny.PIPELINES}


def changed(folder: Path, to: Path, file: str, change) -> Path:
    """A copy of a pipeline's folder, with the weights of one file changed."""
    if to != folder:
        shutil.copytree(folder, to, dirs_exist_ok=True)
    weights = load_file(to / file)
    change(weights)
    save_file(weights, to / file, metadata={"format": "pt"})
    return to


def without(end: str):
    return lambda weights: weights.pop(next(key for key in weights if key.endswith(end)))


def renamed(end: str):
    return lambda weights: weights.update({"another.name": without(end)(weights)})


def filled(end: str, value: float):
    return lambda weights: weights[next(key for key in weights if key.endswith(end))].fill_(value)


CHANGES = {
    "missing in the UNet": (UNET, without("conv_out.bias"), "`unet` in .*missing, and otherwise random: conv_out.bias"),
    "missing in the VAE": (VAE, without("decoder.conv_out.bias"), "`vae` in .*missing.*: decoder.conv_out.bias"),
    "missing in the encoder": (TEXT, without("final_layer_norm.bias"), "`text_encoder` in .*missing.*final_layer_norm"),
    "renamed": (UNET, renamed("conv_out.bias"), "missing.*conv_out.bias; of no part of the model: another.name"),
    "more in the UNet": (UNET, lambda w: w.update(x=torch.zeros(1)), "`unet` in .*of no part of the model: x"),
    "more in the encoder": (TEXT, lambda w: w.update(x=torch.zeros(1)), "`text_encoder` in .*of no part of the model: x"),
    "another shape": (UNET, lambda w: w.update({"conv_out.bias": torch.zeros(9)}), "cannot be loaded: .*conv_out.bias"),
    "NaN in the UNet": (UNET, filled("conv_out.bias", torch.nan), "`unet` has weights that are not finite, such as conv_out"),
    "infinite": (UNET, filled("conv_in.weight", torch.inf), "`unet` has weights that are not finite"),
    "NaN in the VAE": (VAE, filled("decoder.conv_out.bias", torch.nan), "`vae` has weights that are not finite"),
    "NaN in the encoder": (TEXT, filled("final_layer_norm.bias", torch.nan), "`text_encoder` has weights that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_apply_are_refused(folders, tmp_path, change):
    """As policy, as reference and in an evaluation, with the component and the weight; diffusers only warns."""
    file, change, message = CHANGES[change]
    folder = str(changed(folders["sd"], tmp_path / "changed", file, change))
    spec = models.ModelSpec("m", folder, "pipeline", "sha256:0")
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST)
    for load in (
        lambda: load_backbone(folder),
        lambda: load_pipeline(folder),
        lambda: models.load_pipeline(spec, torch.float32, torch.device("cpu")),
        lambda: InstanceDPOTrainer(tiny.sd_pipeline(), folder, args=args, train_dataset=tiny.pairs(2)),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_a_denoiser_that_is_loaded_last_is_checked_too(folders, tmp_path):
    """With `precompute`, its weights come after everything is encoded."""
    for file, change, message in (
        CHANGES["missing in the UNet"],
        CHANGES["more in the UNet"],
        CHANGES["NaN in the UNet"],
    ):
        folder = str(changed(folders["sd"], tmp_path / "changed", file, change))
        backbone = load_backbone(folder, without_denoiser=True)
        with pytest.raises(ValueError, match=message):
            backbone.load_denoiser()


def test_a_loaded_pipeline_with_numbers_that_are_not_finite(folders):
    """The object itself is looked at."""
    for family, name in (("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "transformer"), ("sd3", "vae")):
        pipeline = tiny.PIPELINES[family]()
        with torch.no_grad():
            next(getattr(pipeline, name).parameters()).view(-1)[-1] = torch.nan
        with pytest.raises(ValueError, match=f"`{name}` has weights that are not finite"):
            load_backbone(pipeline)


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_pipelines_as_they_are_saved_are_accepted(folders, tmp_path, family):
    """Whole, in shards, as a variant, as pickles that were asked for, and in half precision."""
    pipeline = tiny.PIPELINES[family]()
    expected = tiny.weights(load_backbone(folders[family]).denoiser)
    for name, settings, loading in (
        ("shards", {"max_shard_size": "20KB"}, {}),
        ("variant", {"variant": "fp16"}, {"variant": "fp16"}),
        ("pickles", {"safe_serialization": False}, {"use_safetensors": False}),
    ):
        pipeline = load_pipeline(str(folders[family]))
        pipeline.save_pretrained(tmp_path / name, **settings)
        backbone = load_backbone(tmp_path / name, **loading)
        assert tiny.max_difference(tiny.weights(backbone.denoiser), expected) == 0
    half = load_pipeline(str(folders[family]), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.vae.parameters()} == {torch.bfloat16}


def test_names_of_older_versions_and_other_towers(folders, tmp_path):
    """A VAE with attention layers named as in 2022 and a text encoder beside CLIP's image encoder are what they should be."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for key in [key for key in weights if "mid_block.attentions" in key]:
            new = key
            for now, before in old.items():
                new = new.replace(f".{now}.", f".{before}.")
            weights[new] = weights.pop(key)

    folder = changed(folders["sd"], tmp_path / "old", VAE, rename)
    changed(folder, folder, TEXT, lambda weights: weights.update({"vision_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}))  # fmt: skip
    assert "query" in " ".join(load_file(folder / VAE)) and "vision_model.x" in load_file(folder / TEXT)
    found, expected = load_backbone(folder).pipeline, load_backbone(folders["sd"]).pipeline
    for name in ("vae", "text_encoder"):
        assert tiny.max_difference(tiny.weights(getattr(found, name)), tiny.weights(getattr(expected, name))) == 0


def test_files_that_are_cut_or_gone(folders, tmp_path):
    """Of a pipeline's folder; a variant that was not named is named."""
    shutil.copytree(folders["sd"], tmp_path / "cut")
    (tmp_path / "cut" / UNET).write_bytes((folders["sd"] / UNET).read_bytes()[:2000])
    shutil.copytree(folders["sd"], tmp_path / "gone")
    (tmp_path / "gone" / UNET).unlink()
    tiny.sd_pipeline().save_pretrained(tmp_path / "variant", variant="fp16")
    for name, message in (
        ("cut", "cannot be loaded: .*diffusion_pytorch_model.safetensors"),
        ("gone", "cannot be loaded: .*no file named diffusion_pytorch_model"),
        ("variant", "cannot be loaded: .*Its files are of the variant fp16: pass it as `variant`"),
    ):
        for load in (load_backbone, load_pipeline):
            with pytest.raises(ValueError, match=f"The pipeline in {tmp_path / name} {message}"):
                load(str(tmp_path / name))


# ---- Classes of one's own ----


class Mine(StableDiffusionPipeline):
    """A pipeline of a user's own class."""


def mine() -> Mine:
    pipeline = tiny.sd_pipeline()
    return Mine(**pipeline.components, requires_safety_checker=False)


def test_a_subclass_counts_as_its_family(tmp_path):
    """It trains as the class that it was made from, with that class as its reference, and plain diffusers loads what is saved."""
    losses = []
    for make in (tiny.sd_pipeline, mine):
        args = InstanceDPOConfig(str(tmp_path / make.__name__), **tiny.FAST)
        trainer = InstanceDPOTrainer(make(), tiny.other_unet(), args=args, train_dataset=tiny.pairs(4))
        trainer.train()
        losses.append(tiny.losses(trainer))
    assert losses[0] == losses[1] and len(losses[0]) == 3
    trainer.save_model()
    assert type(trainer.backbone.pipeline) is Mine
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "mine")
    assert type(load_pipeline(str(tmp_path / "mine"))) is StableDiffusionPipeline
    assert tiny.max_difference(tiny.weights(saved.unet), tiny.weights(trainer.policy)) == 0
    InstanceDPOTrainer(tiny.sd_pipeline(), mine(), args=args, train_dataset=tiny.pairs(4))


def test_pipelines_of_other_tasks_are_refused():
    """No class of diffusers is taken for another one, whatever it was made from."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    for other in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        pipeline = other(**tiny.sd_pipeline().components, requires_safety_checker=False)
        with pytest.raises(ValueError, match=f"`model` is a `{other.__name__}`, a family that is not supported"):
            load_backbone(pipeline)
    other = type(
        "StableDiffusionOtherPipeline", (StableDiffusionPipeline,), {"__module__": "diffusers.pipelines.other"}
    )
    with pytest.raises(ValueError, match="`model` is a `StableDiffusionOtherPipeline`"):
        load_backbone(other(**tiny.sd_pipeline().components, requires_safety_checker=False))
