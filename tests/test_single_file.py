# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A model that is one file, in the layout of the original code, is the model that it was made from."""

import inspect
import logging
from pathlib import Path

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


def part_of(weights, *prefixes: str):
    """The weights but for those of some beginnings."""
    return {key: weight for key, weight in weights.items() if not key.startswith(prefixes)}


def in_type(weights, dtype: torch.dtype):
    return {key: weight.to(dtype) for key, weight in weights.items()}


VAE, CLIP, CLIPS = "first_stage_model.", "cond_stage_model.", "conditioner."
# Files as people have them: the pipeline, the weights, and how much the prediction of a rounded file may differ
LAYOUTS = {
    "SD float32": ("sd", lambda sd, _: sd, 0),
    "SD float16": ("sd", lambda sd, _: in_type(sd, torch.float16), 0.01),
    "SD bfloat16": ("sd", lambda sd, _: in_type(sd, torch.bfloat16), 0.05),
    "SD float8": ("sd", lambda sd, _: in_type(sd, torch.float8_e4m3fn), 0.5),
    "SD with EMA": ("sd", lambda sd, _: sd | averages(sd), 0),
    "SD without VAE": ("sd", lambda sd, _: part_of(sd, VAE), 0),
    "SD without text encoder": ("sd", lambda sd, _: part_of(sd, CLIP), 0),
    "SD, the UNet alone": ("sd", lambda sd, _: part_of(sd, VAE, CLIP), 0),
    "SDXL": ("sdxl", lambda _, xl: xl, 0),
    "SDXL float16": ("sdxl", lambda _, xl: in_type(xl, torch.float16), 0.01),
    "SDXL without VAE": ("sdxl", lambda _, xl: part_of(xl, VAE), 0),
    "SDXL without text encoders": ("sdxl", lambda _, xl: part_of(xl, CLIPS), 0),
    "SDXL, the UNet alone": ("sdxl", lambda _, xl: part_of(xl, VAE, CLIPS), 0),
}


def averages(weights):
    """The running mean of a UNet as the original code names it, with other numbers."""
    names = {key: key.removeprefix("model.").replace(".", "") for key in weights if key.startswith(UNET)}
    return {f"model_ema.{name}": weights[key] + 1 for key, name in names.items()} | {"model_ema.decay": torch.ones(1)}


@pytest.fixture(scope="module")
def originals(files) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return sd_file(), sdxl_file(load_pipeline(files["sdxl"][1]))


def outputs(backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser predicts, and how the VAE encodes an image."""
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return tiny.predictions(backbone, backbone.denoiser), backbone.encode_images(image)[0]


@pytest.fixture(scope="module")
def expected(files) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {family: outputs(load_backbone(files[family][1])) for family in ("sd", "sdxl")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_layouts(files, originals, expected, tmp_path, layout, ending):
    """The prediction is that of the pipeline, exactly where the file is not rounded, and in the type that was asked for."""
    family, make, tolerance = LAYOUTS[layout]
    weights = make(*originals)
    path = tmp_path / f"model.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        save_file(weights, path)
    found = load_backbone(path, config=files[family][1])
    assert found.denoiser.dtype == found.pipeline.vae.dtype == torch.float32
    for output, of_the_pipeline in zip(outputs(found), expected[family], strict=True):
        assert (output - of_the_pipeline).abs().max() <= tolerance


def test_a_file_that_says_that_it_predicts_velocity(files, tmp_path):
    """The key `v_pred` of some files needs a configuration that agrees."""
    tiny.sd_pipeline("v_prediction").save_pretrained(tmp_path / "v")
    save_file(sd_file() | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    backbone = load_backbone(tmp_path / "v.safetensors", config=tmp_path / "v")
    assert backbone.process.describe() == load_backbone(tmp_path / "v").process.describe()
    with pytest.raises(ValueError, match="predicts velocity .*`v_pred`.* says 'epsilon'"):
        load_backbone(tmp_path / "v.safetensors", config=files["sd"][1])


class Code:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_files_that_cannot_be_read(tmp_path, files, monkeypatch):
    """Each is refused with what is wrong with it, for a training and for an evaluation; no code of a pickle is run."""
    monkeypatch.chdir(tmp_path)
    data = Path(files["sd"][0]).read_bytes()
    torch.save({"state_dict": sd_file(), "callbacks": Code()}, tmp_path / "code.ckpt")
    torch.save(sd_file(), tmp_path / "cut.ckpt")
    cut = (tmp_path / "cut.ckpt").read_bytes()[:3000]
    for name, content, message in (
        ("a.safetensors", b"", "it is empty"),
        ("a.ckpt", b"", "it is empty"),
        ("a.safetensors", data[:-1000], f"damaged, with {len(data) - 1000:,} bytes in place of {len(data):,}"),
        ("a.safetensors", data[:100], "it is cut off within its first"),
        ("a.safetensors", b"<!DOCTYPE html><html>Log in</html>", "it is a web page"),
        ("a.ckpt", b"\n<html>Log in</html>", "it is a web page"),
        ("a.safetensors", b'{"error": "unauthorized"}', 'it is the message of a server .*"unauthorized"'),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.ckpt", cut, "it is damaged, or holds more than weights"),
        ("a.ckpt", (tmp_path / "code.ckpt").read_bytes(), "could be code and is not loaded"),
    ):
        (tmp_path / name).write_bytes(content)
        for load in (load_backbone, load_pipeline):
            with pytest.raises(ValueError, match=f"{name} cannot be read: .*{message}"):
                load(name, config=files["sd"][1])
    assert not Path("ran").exists()


def test_weights_that_are_missing_or_do_not_fit(tmp_path, files):
    """In every component; numbers that are not finite and quantized weights are refused too."""
    weights = sd_file()
    scales = {f"{UNET}out.2.scale_weight": torch.ones(1)}
    integers = {f"{UNET}out.2.weight": weights[f"{UNET}out.2.weight"].to(torch.int8)}
    nan = {f"{UNET}out.2.bias": torch.full((4,), torch.nan)}
    for changed, message in (
        (part_of(weights, "first_stage_model.decoder.conv_out.bias"), "is without some of the weights"),
        (part_of(weights, "cond_stage_model.transformer.text_model.final"), "is without some of the weights"),
        (weights | {f"{UNET}out.2.bias": torch.zeros(7)}, "does not fit .*conv_out.bias expected shape"),
        (weights | nan, "`unet` has weights that are not finite, such as conv_out.bias"),
        (weights | scales, "holds quantized weights"),
        (weights | integers, "holds quantized weights"),
    ):
        save_file(changed, tmp_path / "m.safetensors")
        for load in (load_backbone, load_pipeline):
            with pytest.raises(ValueError, match=message):
                load(str(tmp_path / "m.safetensors"), config=files["sd"][1])


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
        ({"unet.lora_A.weight": (1,)}, "holds a LoRA.* Pass the model that it was trained on"),
        ({"lora_unet_mid_block.lora_up.weight": (1,)}, "holds a LoRA"),
        ({"lora_unet_mid_block.hada_w1_a": (1,)}, "holds a LoRA"),
        ({"control_model.time_embed.0.weight": (1, 1)}, "holds a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (1,)}, "holds a ControlNet"),
        ({"ip_adapter.1.to_k_ip.weight": (1,), "image_proj.proj.weight": (1,)}, "holds an IP-Adapter"),
        ({"emb_params": (1, 8)}, "holds a textual inversion"),
        ({"decoder.conv_in.weight": (1,), "encoder.conv_in.weight": (1,)}, "holds a VAE.* Pass it as `vae`"),
        ({"text_model.embeddings.token_embedding.weight": (1,)}, "holds a text encoder"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (1,), "shared.weight": (1,)}, "holds a text encoder"),
        ({"time_embedding.linear_1.weight": (1,)}, "holds the UNet of a pipeline's folder.* the whole pipeline"),
        ({"transformer_blocks.0.attn.to_q.weight": (1,)}, "holds the transformer of a pipeline's folder"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "'instruct-pix2pix'"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 5, 3, 3), f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (1, 1024)}, "5 channels .depth maps"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3), f"{UNET}label_emb.0.0.weight": (1, 2816)}, "kind 'instruct-pix2pix'|8 channels"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), f"{UNET}label_emb.0.0.weight": (1, 2560)}, "'xl_refiner'"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3), "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)}, "'xl_inpaint'"),
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
