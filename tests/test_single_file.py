# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A model that is one file, in the layout of the original code, is the model that it was made from."""

import inspect
import logging
import re

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone, load_pipeline
from trl_diffusion.backbones.single_file import is_single_file


Weights = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


# ----- from diffusers to the original layout: the inverse of what is tested, written by hand -----


def renamed(weights: Weights, *names: tuple[str, str]) -> Weights:
    """Weights with parts of their names replaced: each by the first pattern that it matches."""
    result = {}
    for key, weight in weights.items():
        name = next((re.sub(old, new, key) for old, new in names if re.match(old, key)), None)
        assert name is not None, f"no name for {key}"
        result[name] = weight.contiguous()
    assert len(result) == len(weights)
    return result


def original_unet(weights: Weights, prefix: str = UNET) -> Weights:
    """The UNets of `tests.tiny`: two levels of one layer."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    inside = {".".join(key.split(".")[:-1]): key for key in weights}
    names = []
    for module in inside:
        head, _, tail = module.rpartition(".")
        if ".resnets." in module:
            names.append((re.escape(module), f"{head}.{resnet[tail]}"))
    weights = renamed(weights, *((old + r"(?=\.)", new) for old, new in names), ("", ""))
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        # After the attention, if there is one
        "up_blocks.0.upsamplers.0.conv": f"output_blocks.1.{2 if any('up_blocks.0.att' in key for key in weights) else 1}.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    return renamed(weights, *((re.escape(old) + r"(?=\.)", prefix + new) for old, new in blocks.items()))


def original_vae(weights: Weights, prefix: str = "first_stage_model.") -> Weights:
    """The VAE of `tests.tiny`: three levels, of which the decoder's are counted from the other end."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names = [
        (rf"(\w+)\.mid_block\.attentions\.0\.{re.escape(old)}\.", rf"\1.mid.attn_1.{new}.")
        for old, new in attention.items()
    ]
    names += [(rf"(\w+)\.mid_block\.resnets\.{n}\.", rf"\1.mid.block_{n + 1}.") for n in range(2)]
    for n in range(3):
        names += [
            (rf"encoder\.down_blocks\.{n}\.resnets\.(\d)\.conv_shortcut", rf"encoder.down.{n}.block.\1.nin_shortcut"),
            (rf"encoder\.down_blocks\.{n}\.resnets\.(\d)", rf"encoder.down.{n}.block.\1"),
            (rf"encoder\.down_blocks\.{n}\.downsamplers\.0", rf"encoder.down.{n}.downsample"),
            (rf"decoder\.up_blocks\.{n}\.resnets\.(\d)\.conv_shortcut", rf"decoder.up.{2 - n}.block.\1.nin_shortcut"),
            (rf"decoder\.up_blocks\.{n}\.resnets\.(\d)", rf"decoder.up.{2 - n}.block.\1"),
            (rf"decoder\.up_blocks\.{n}\.upsamplers\.0", rf"decoder.up.{2 - n}.upsample"),
        ]
    names += [(r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"), ("", "")]
    weights = renamed(weights, *names)
    # The original attention is a convolution of 1x1
    return {
        prefix + key: weight[:, :, None, None].contiguous() if ".attn_1." in key and weight.ndim == 2 else weight
        for key, weight in weights.items()
    }


def original_clip(weights: Weights, prefix: str) -> Weights:
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": weight.contiguous() for key, weight in weights.items()
    }


def original_open_clip(weights: Weights, prefix: str) -> Weights:
    weights, result = dict(weights), {}
    for key in [key for key in weights if ".q_proj." in key]:
        three = torch.cat([weights.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")])
        layer, what = re.match(r".*layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key).groups()
        result[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{what}"] = three
    result[f"{prefix}text_projection"] = weights.pop("text_projection.weight").T.contiguous()
    names = [
        (r".*position_embedding\.weight", "positional_embedding"),
        (r".*token_embedding", "token_embedding"),
        (r".*final_layer_norm", "ln_final"),
        (r".*layers\.(\d+)\.layer_norm(\d)", r"transformer.resblocks.\1.ln_\2"),
        (r".*layers\.(\d+)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
        (r".*layers\.(\d+)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
        (r".*layers\.(\d+)\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    ]
    return result | {prefix + key: weight for key, weight in renamed(weights, *names).items()}


def joined(weights: Weights, *names: str) -> Weights:
    """Weights and biases of several layers as one layer."""
    return {what: torch.cat([weights.pop(f"{name}.{what}") for name in names]) for what in ("weight", "bias")}


def swapped(weight: torch.Tensor) -> torch.Tensor:
    """Of a modulation: diffusers has the scale first, the original the shift."""
    return torch.cat(weight.chunk(2)[::-1])


def original_sd3(weights: Weights, prefix: str = UNET) -> Weights:
    weights, result = dict(weights), {}
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    for n in range(last + 1):
        ours, theirs = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        threes = [
            ("x_block.attn", [f"attn.to_{x}" for x in "qkv"]),
            ("context_block.attn", [f"attn.add_{x}_proj" for x in "qkv"]),
        ]
        if f"{ours}.attn2.to_q.weight" in weights:
            threes.append(("x_block.attn2", [f"attn2.to_{x}" for x in "qkv"]))
        for name, three in threes:
            for what, weight in joined(weights, *(f"{ours}.{one}" for one in three)).items():
                result[f"{theirs}.{name}.qkv.{what}"] = weight
    for key in ["norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"]:
        for what in ("weight", "bias"):
            weights[f"{key}.{what}"] = swapped(weights[f"{key}.{what}"])
    block = r"transformer_blocks\.(\d+)\."
    names = [
        (block + r"attn(2?)\.norm_([qk])", r"joint_blocks.\1.x_block.attn\2.ln_\3"),
        (block + r"attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
        (block + r"attn(2?)\.to_out\.0", r"joint_blocks.\1.x_block.attn\2.proj"),
        (block + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
        (block + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        (block + r"norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
        (block + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (block + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        (block + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
        (block + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        (r"context_embedder", "context_embedder"),
    ]
    return {prefix + key: weight for key, weight in (result | renamed(weights, *names)).items()}


def original_flux(weights: Weights, prefix: str = "") -> Weights:
    weights, result = dict(weights), {}
    for ours, theirs, parts in (
        ("transformer_blocks.0", "double_blocks.0.img_attn.qkv", [f"attn.to_{x}" for x in "qkv"]),
        ("transformer_blocks.0", "double_blocks.0.txt_attn.qkv", [f"attn.add_{x}_proj" for x in "qkv"]),
        ("single_transformer_blocks.0", "single_blocks.0.linear1", [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]),
    ):
        for what, weight in joined(weights, *(f"{ours}.{part}" for part in parts)).items():
            result[f"{theirs}.{what}"] = weight
    for what in ("weight", "bias"):
        weights[f"norm_out.linear.{what}"] = swapped(weights[f"norm_out.linear.{what}"])
    double, single, embedder = r"transformer_blocks\.0\.", r"single_transformer_blocks\.0\.", r"time_text_embed\."
    names = [
        (double + r"norm1\.linear", "double_blocks.0.img_mod.lin"),
        (double + r"norm1_context\.linear", "double_blocks.0.txt_mod.lin"),
        (double + r"attn\.norm_q\.weight", "double_blocks.0.img_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_k\.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
        (double + r"attn\.norm_added_q\.weight", "double_blocks.0.txt_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_added_k\.weight", "double_blocks.0.txt_attn.norm.key_norm.scale"),
        (double + r"attn\.to_out\.0", "double_blocks.0.img_attn.proj"),
        (double + r"attn\.to_add_out", "double_blocks.0.txt_attn.proj"),
        (double + r"ff\.net\.0\.proj", "double_blocks.0.img_mlp.0"),
        (double + r"ff\.net\.2", "double_blocks.0.img_mlp.2"),
        (double + r"ff_context\.net\.0\.proj", "double_blocks.0.txt_mlp.0"),
        (double + r"ff_context\.net\.2", "double_blocks.0.txt_mlp.2"),
        (single + r"norm\.linear", "single_blocks.0.modulation.lin"),
        (single + r"attn\.norm_q\.weight", "single_blocks.0.norm.query_norm.scale"),
        (single + r"attn\.norm_k\.weight", "single_blocks.0.norm.key_norm.scale"),
        (single + r"proj_out", "single_blocks.0.linear2"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        (r"context_embedder", "txt_in"),
        (r"x_embedder", "img_in"),
    ]
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        names += [
            (embedder + rf"{ours}_embedder\.linear_1", f"{theirs}.in_layer"),
            (embedder + rf"{ours}_embedder\.linear_2", f"{theirs}.out_layer"),
        ]
    return {prefix + key: weight for key, weight in (result | renamed(weights, *names)).items()}


# ----- tiny models of which the kind is told from the real names and shapes -----


def sdxl_pipeline():
    """With a second encoder of ten layers, by whose last one diffusers knows SDXL, and of a width of its own."""
    pipeline = tiny.sdxl_pipeline()
    small = {"vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 12, "num_attention_heads": 2}
    small |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_hidden_layers": 10}
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=24, intermediate_size=32, projection_dim=24, **small)
    )
    config = dict(pipeline.unet.config) | {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 72}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    return pipeline


def sd3_pipeline():
    """With the 38 layers by which diffusers knows Stable Diffusion 3.5 large."""
    pipeline = tiny.sd3_pipeline()
    pipeline.transformer = SD3Transformer2DModel.from_config(dict(pipeline.transformer.config) | {"num_layers": 38})
    return pipeline


def sd_file() -> Weights:
    pipeline = tiny.sd_pipeline()
    return (
        original_unet(pipeline.unet.state_dict())
        | original_vae(pipeline.vae.state_dict())
        | original_clip(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.")
    )


def sdxl_file(pipeline) -> Weights:
    return (
        original_unet(pipeline.unet.state_dict())
        | original_vae(pipeline.vae.state_dict())
        | original_clip(pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        | original_open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    )


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
        ({"unet.lora_A.weight": (1,)}, "holds no model that is known. .* a LoRA, or a file out of a pipeline's folder, is none"),
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
