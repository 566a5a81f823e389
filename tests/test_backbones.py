# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A backbone says of a pipeline what the pipeline itself does."""

import json
import logging

import pytest
import torch
from diffusers import AutoencoderDC, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests import tiny
from trl_diffusion.backbones import base, load_backbone, load_pipeline


CLOSE = {"atol": 1e-6, "rtol": 1e-6}
PROMPTS = ["a red circle", "a cat and a dog"]


def images(num: int = 2) -> torch.Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def guided_embeddings(pipeline) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the pipeline itself encodes for guidance: of the prompts, and of the unconditional branch."""
    encoded = pipeline.encode_prompt(
        PROMPTS, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    pairs = zip(encoded[::2], encoded[1::2], strict=True)
    return dict(zip(("prompt_embeds", "text_embeds"), pairs))


# ---- Prompts ----


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_unconditional_branch_is_the_pipelines(family):
    """`None` is what `encode_prompt` gives the unconditional branch: zeros for SDXL, the encoding of "" for SD."""
    backbone = load_backbone(tiny.PIPELINES[family]())
    expected = guided_embeddings(backbone.pipeline)
    conditional, unconditional = backbone.encode_prompts(PROMPTS), backbone.encode_prompts([None, None])
    assert conditional.keys() == unconditional.keys() == expected.keys()
    for name, (of_prompts, of_nothing) in expected.items():
        torch.testing.assert_close(conditional[name], of_prompts, **CLOSE)
        torch.testing.assert_close(unconditional[name], of_nothing, **CLOSE)
        assert (unconditional[name] == 0).all() == (family == "sdxl")
        assert (conditional[name] - unconditional[name]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_batch_may_mix_both_branches(family):
    """Every row of a batch is what it is alone; "" is a prompt of its own, which SDXL does not take for `None`."""
    backbone = load_backbone(tiny.PIPELINES[family]())
    prompts = [None, PROMPTS[0], "", None, PROMPTS[1]]
    together = backbone.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        for name, alone in backbone.encode_prompts([prompt]).items():
            torch.testing.assert_close(together[name][row], alone[0], **CLOSE)
    same = torch.equal(together["prompt_embeds"][0], together["prompt_embeds"][2])
    assert same == (family == "sd")


def test_an_sdxl_without_forced_zeros():
    """`force_zeros_for_empty_prompt=False` makes the unconditional branch the encoding of ""."""
    pipeline = tiny.sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    backbone = load_backbone(pipeline)
    unconditional, empty = backbone.encode_prompts([None, None]), backbone.encode_prompts(["", ""])
    for name, (_, of_nothing) in guided_embeddings(pipeline).items():
        torch.testing.assert_close(unconditional[name], of_nothing, **CLOSE)
        assert torch.equal(unconditional[name], empty[name])
        assert unconditional[name].abs().max() > 1e-3


# ---- Latents ----

STATISTICS = {
    "scale": {"scaling_factor": 0.3},
    "scale and shift": {"scaling_factor": 0.3, "shift_factor": 0.2},
    "mean and deviation": {
        "scaling_factor": 0.5,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
    },
}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_latents_are_what_the_pipeline_decodes(statistics):
    """The statistics that training takes off are those that the pipeline adds before it decodes."""
    config = STATISTICS[statistics]
    backbone = load_backbone(tiny.sdxl_pipeline())
    vae = backbone.pipeline.vae
    vae.register_to_config(**config)
    mean, std = backbone.encode_images(images())
    with torch.no_grad():
        posterior = vae.encode(images()).latent_dist
    per_channel = [
        torch.tensor(config.get(key, [default] * 4)).view(1, 4, 1, 1)
        for key, default in (("latents_mean", 0.0), ("latents_std", 1.0))
    ]
    # `StableDiffusionXLPipeline` and, where there is a shift, `StableDiffusion3Pipeline`, before `vae.decode`
    decoded = mean * per_channel[1] / config["scaling_factor"] + per_channel[0] + config.get("shift_factor", 0.0)
    torch.testing.assert_close(decoded, posterior.mean, **CLOSE)
    torch.testing.assert_close(std, posterior.std * config["scaling_factor"] / per_channel[1], **CLOSE)
    shift, scale = backbone.latent_statistics()
    assert shift.shape == ((1, 4, 1, 1) if "latents_mean" in config else (1, 1, 1, 1))
    assert scale.shape == ((1, 4, 1, 1) if "latents_std" in config else (1, 1, 1, 1))


@pytest.mark.parametrize(("num_images", "slices"), [(1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
def test_images_are_encoded_in_slices(num_images, slices, monkeypatch):
    """The VAE is given as many images as have the most pixels, at least one, and the moments are those of all images at once."""
    backbone = load_backbone(tiny.sdxl_pipeline())
    vae, given = backbone.pipeline.vae, []
    whole = backbone.encode_images(images(num_images))
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: given.append(len(pixels)) or encode(pixels))
    for max_pixels, expected in ((2 * 32**2 + 31, slices), (100, [1] * num_images)):
        given.clear()
        monkeypatch.setattr(base, "MAX_PIXELS", max_pixels)
        for moment, of_all in zip(backbone.encode_images(images(num_images)), whole, strict=True):
            torch.testing.assert_close(moment, of_all, **CLOSE)
        assert given == expected
    monkeypatch.undo()
    assert base.MAX_PIXELS == 1024**2  # one image of SDXL, four of Stable Diffusion 1.5


@pytest.mark.parametrize("statistics", ["scale", "mean and deviation"])
def test_the_pipeline_hands_its_decoder_what_the_encoder_gave(statistics, monkeypatch):
    """Latents of an image, put in place of the last ones of the sampler, reach `vae.decode` as the VAE encoded them."""
    backbone = load_backbone(tiny.sdxl_pipeline())
    pipeline, vae = backbone.pipeline, backbone.pipeline.vae
    pipeline.set_progress_bar_config(disable=True)
    vae.register_to_config(**STATISTICS[statistics])
    mean, _ = backbone.encode_images(images(1))
    seen, decode = [], vae.decode
    monkeypatch.setattr(
        vae, "decode", lambda latents, **kwargs: seen.append(latents.clone()) or decode(latents, **kwargs)
    )
    pipeline("a cat", num_inference_steps=1, callback_on_step_end=lambda *args: {"latents": mean})
    with torch.no_grad():
        torch.testing.assert_close(seen[0], vae.encode(images(1)).latent_dist.mean, **CLOSE)


def test_a_vae_without_a_posterior():
    """The latents of a deterministic autoencoder have no deviation."""
    backbone = load_backbone(tiny.sd_pipeline())
    torch.manual_seed(0)
    backbone.pipeline.vae = vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    ).requires_grad_(False)
    mean, std = backbone.encode_images(images())
    torch.testing.assert_close(mean, vae.encode(images()).latent * 0.4, **CLOSE)
    assert mean.dtype == std.dtype == torch.float32 and std.shape == mean.shape
    assert mean.abs().max() > 0 and (std == 0).all()


# ---- Lending the pipeline ----


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("was_training", [False, True])
@pytest.mark.parametrize("family", ["sd", *tiny.FLOWS])
def test_sampling_leaves_everything_as_it_was(family, fails, was_training):
    """Inside, the pipeline has the other denoiser, in evaluation; after, also after an error, its own and every mode."""
    backbone = load_backbone(tiny.PIPELINES[family]())
    own, other = backbone.denoiser, load_backbone(tiny.PIPELINES[family]()).denoiser
    own.train()
    other.train(was_training)

    def sample():
        with backbone.sampling_with(other) as pipeline:
            assert pipeline is backbone.pipeline and getattr(pipeline, backbone.denoiser_name) is other
            assert not any(module.training for module in other.modules())
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            sample()
    else:
        sample()
    assert backbone.denoiser is own and own.training
    assert all(module.training == was_training for module in other.modules())


def test_offloaded_encoders_come_back_while_the_pipeline_is_lent(monkeypatch):
    """Offloaded encoders are moved to the device and, also after an error, off it again."""
    backbone = load_backbone(tiny.sd_pipeline())
    backbone.to(torch.device("cpu"))
    moves = []
    for name in ("vae", "text_encoder"):
        module = getattr(backbone.pipeline, name)
        monkeypatch.setattr(module, "to", lambda device, name=name: moves.append((name, str(device))))
    backbone.device = torch.device("meta")  # told apart from the CPU
    backbone.offload(("vae",))
    assert moves == [("vae", "cpu")]
    with pytest.raises(KeyError):
        with backbone.sampling_with(backbone.denoiser):
            assert moves[1:] == [("vae", "meta")]
            raise KeyError("stop")
    assert moves[2:] == [("vae", "cpu")]


# ---- The safety checker ----


def checked_pipeline() -> StableDiffusionPipeline:
    """A pipeline with a safety checker."""
    pipeline = tiny.sd_pipeline()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16)
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor(size=8, crop_size=8)
    )
    pipeline.register_to_config(requires_safety_checker=True)
    return pipeline


@pytest.mark.parametrize("given", ["folder", "pipeline"])
def test_a_safety_checker_is_removed(tmp_path, caplog, given):
    """It is dropped with a warning from a folder and from a loaded pipeline, and is not in what is saved."""
    model = checked_pipeline()
    if given == "folder":
        model.save_pretrained(tmp_path / "model")
        assert (tmp_path / "model" / "safety_checker").is_dir()
        model = tmp_path / "model"
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(model)
    assert "safety checker" in caplog.text
    assert backbone.pipeline.safety_checker is None
    assert backbone.pipeline.config.requires_safety_checker is False
    backbone.pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "safety_checker").exists()
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_pipeline(str(tmp_path / "saved")).safety_checker is None
    assert "safety" not in caplog.text


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_pipeline_without_a_safety_checker_is_loaded_silently(tmp_path, caplog, family):
    """Nothing is said where nothing is removed, and the weights are those that were saved."""
    pipeline = tiny.PIPELINES[family]()
    pipeline.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(tmp_path)
        load_backbone(pipeline)
    assert "safety" not in caplog.text
    assert tiny.max_difference(tiny.weights(backbone.denoiser), tiny.weights(pipeline.unet)) == 0
