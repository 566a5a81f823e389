# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A model that is one file, in the layout of the original code, is the model that it was made from."""

import inspect
import logging

import pytest
import torch
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import save_file

from tests import tiny
from tests.original_layouts import UNET, original_flux, original_sd3, sd3_pipeline, sd_file, sdxl_file, sdxl_pipeline
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone, load_pipeline
from trl_diffusion.backbones.single_file import is_single_file


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """For each family a single file, and the folder of the pipeline that it was made from."""
    root = tmp_path_factory.mktemp("files")
    made = {}
    for name, pipeline, weights in (
        ("sd", tiny.sd_pipeline(), None),
        ("sdxl", sdxl_pipeline(), sdxl_file),
        ("sd3", sd3_pipeline(), lambda pipeline: original_sd3(pipeline.transformer.state_dict())),
        ("flux", tiny.flux_pipeline(), lambda pipeline: original_flux(pipeline.transformer.state_dict())),
        (
            "schnell",
            tiny.flux_pipeline(guidance_embeds=False),
            lambda p: original_flux(p.transformer.state_dict(), UNET),
        ),
    ):
        pipeline.save_pretrained(root / name)
        save_file(sd_file() if weights is None else weights(pipeline), root / f"{name}.safetensors")
        made[name] = str(root / f"{name}.safetensors"), str(root / name)
    return made


@pytest.fixture(autouse=True)
def width_of_flux(monkeypatch):
    """diffusers' conversion of FLUX.1 as it is, but for the number 3072 of the width."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 16"), scope)
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(mapping, "checkpoint_mapping_fn", scope["convert_flux_transformer_checkpoint_to_diffusers"])


FAMILIES = ["sd", "sdxl", "sd3", "flux", "schnell"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_pipeline_that_it_was_made_from(files, family):
    """Every weight of every component is the same to the last bit, and so are the images."""
    file, folder = files[family]
    pipeline, expected = load_pipeline(file, config=folder), load_pipeline(folder)
    assert type(pipeline) is type(expected) and pipeline.scheduler.config == expected.scheduler.config
    for name, component in expected.components.items():
        if isinstance(component, torch.nn.Module):
            own = getattr(pipeline, name)
            assert tiny.max_difference(tiny.weights(own), tiny.weights(component)) == 0, name
    images = []
    for one in (pipeline, expected):
        one.set_progress_bar_config(disable=True)
        settings = {"max_sequence_length": 16} if family in ("sd3", "flux", "schnell") else {}
        generator = torch.Generator().manual_seed(0)
        settings |= {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        images.append(one("a red circle", generator=generator, **settings).images)
    assert torch.equal(*images)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_what_a_file_is_without_is_named(files, family, caplog):
    """A file of the transformer alone takes the rest from `config`, with a warning."""
    file, folder = files[family]
    with caplog.at_level(logging.WARNING):
        load_pipeline(file, config=folder)
    names = ["vae", "text_encoder", "text_encoder_2", *(["text_encoder_3"] if family == "sd3" else [])]
    assert f"{file} is without {', '.join(f'`{name}`' for name in names)}; taken from {folder}." in caplog.text


def test_precision(files):
    """A training in half precision has its VAE in float32, not rounded before; another precision is that of the user."""
    for family in ("sd", "flux"):
        file, folder = files[family]
        pipeline = load_backbone(
            file, config=folder, denoiser_dtype=torch.bfloat16, encoder_dtype=torch.bfloat16
        ).pipeline
        assert pipeline.text_encoder.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
        denoiser = pipeline.unet if family == "sd" else pipeline.transformer
        assert denoiser.dtype == torch.bfloat16
        assert tiny.max_difference(tiny.weights(pipeline.vae), tiny.weights(load_pipeline(folder).vae)) == 0
        assert load_backbone(file, config=folder, dtype="float16").pipeline.vae.dtype == torch.float16


def test_a_training_from_a_file_is_that_from_the_folder(files, tmp_path):
    """The losses are the same, by `model_init_kwargs={"config": ...}`, and the model that is saved is a pipeline's folder."""
    file, folder = files["sd"]
    losses = []
    for model, settings in ((file, {"config": folder}), (folder, None)):
        args = InstanceDPOConfig(str(tmp_path / "out"), model_init_kwargs=settings, **tiny.FAST)
        trainer = InstanceDPOTrainer(model, args=args, train_dataset=tiny.pairs(4))
        trainer.train()
        losses.append(tiny.losses(trainer))
    assert losses[0] == losses[1] and len(losses[0]) == 3
    trainer.save_model()
    assert load_pipeline(str(tmp_path / "out")).unet.config.sample_size == 8


def test_folders_and_names_that_are_no_file(tmp_path, files):
    """A Hub id and a pipeline's folder are none; a folder that holds only files is refused with the first one's path."""
    assert not is_single_file("user/model") and not is_single_file(files["sd"][1])
    save_file({"x": torch.zeros(1)}, tmp_path / "v1-5.safetensors")
    with pytest.raises(
        ValueError, match=f"holds no pipeline .*but the file v1-5.safetensors: pass {tmp_path}/v1-5.safetensors"
    ):
        load_pipeline(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="holds a LoRA .* pass the model that it was trained on"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="There is no file .*no.safetensors"):
        load_pipeline(str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": (1,)}, "holds no model that is known. .* `StableDiffusionPipeline`"),
        ({"edm_mean": (1,)}, "a model of the kind 'playground-v2-5'. .* `StableDiffusionXLPipeline`"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, "a model of the kind 'inpainting'"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "guidance_in.in_layer.bias": (8,), "img_in.weight": (8, 384)}, "'flux-fill'"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_their_kind(tmp_path, weights, message):
    """What is no text-to-image model of a supported family is refused before anything is loaded."""
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path / "x.safetensors"))


def test_a_configuration_that_does_not_fit(files, tmp_path):
    """It must be of the file's family, of the variant of FLUX.1, and it must be there."""
    with pytest.raises(ValueError, match="a `StableDiffusionXLPipeline`, and .* holds a `StableDiffusionPipeline`"):
        load_pipeline(files["sd"][0], config=files["sdxl"][1])
    for file, config in (("flux", "schnell"), ("schnell", "flux")):
        with pytest.raises(
            ValueError, match=f"of the kind 'flux-.*', and `config` is {files[config][1]}, .* guidance scale"
        ):
            load_pipeline(files[file][0], config=files[config][1])
    with pytest.raises(ValueError, match="stable-diffusion-v1-5 cannot be had: .* Pass the folder or the Hub id"):
        load_pipeline(files["sd"][0])
    weights = sd_file()
    del weights[f"{UNET}out.2.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="is without some of the weights of a `StableDiffusionPipeline`"):
        load_pipeline(str(tmp_path / "part.safetensors"), config=files["sd"][1])
