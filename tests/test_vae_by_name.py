# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A VAE that is named takes the place of the pipeline's, in trainings, evaluations, caches, cards and what is saved."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.original_layouts import original_vae, sd_file
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, ModelConfig
from trl_diffusion.backbones import load_backbone, load_pipeline
from trl_diffusion.backbones import vae as module
from trl_diffusion.evaluation.models import load_pipeline as load_evaluated
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.scripts.evaluate_models import EvaluateArguments, get_models
from trl_diffusion.scripts.utils import get_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base`, a pipeline; `vae`, another VAE alone; `whole`, a pipeline with that VAE; single files of it in two layouts."""
    folder = tmp_path_factory.mktemp("models")
    tiny.sd_pipeline().save_pretrained(folder / "base")
    other = tiny.sd_pipeline(seed=3)
    other.save_pretrained(folder / "whole")
    other.vae.save_pretrained(folder / "vae")
    save_file(original_vae(other.vae.state_dict(), ""), folder / "original.safetensors")
    save_file(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"), folder / "diffusers.safetensors")
    save_file(sd_file(), folder / "base.safetensors")
    return folder


NAMES = ("vae", "whole", "original.safetensors", "diffusers.safetensors")


def difference(vae, folder: Path) -> float:
    return tiny.max_difference(tiny.weights(vae), tiny.weights(load_pipeline(str(folder / "whole")).vae))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", ["base", "base.safetensors"])
def test_the_vae_is_the_one_that_is_named(folder, name, base):
    """A folder of a VAE or of a pipeline, and a file as the original code or diffusers names its weights; text or path."""
    config = {"config": str(folder / "base")} if base.endswith("safetensors") else {}
    for vae in (str(folder / name), folder / name):
        assert difference(load_backbone(folder / base, vae=vae, **config).pipeline.vae, folder) == 0
        assert difference(load_pipeline(str(folder / base), vae=vae, **config).vae, folder) == 0
    half = load_backbone(folder / base, vae=vae, encoder_dtype=torch.bfloat16, **config).pipeline
    assert (half.text_encoder.dtype, half.vae.dtype) == (
        torch.bfloat16 if base == "base" else torch.float32,
        torch.float32,
    )
    given = load_backbone(folder / base, vae=vae, dtype={"vae": "float16"}, **config).pipeline
    assert given.vae.dtype == torch.float16


def test_names_of_the_hub(folder, monkeypatch):
    """A Hub id is asked for a VAE, and then for that of a pipeline, with the arguments for the Hub and without the revision."""
    asked, load = [], module.AutoencoderKL.load_config

    def config(where, **settings):
        asked.append((where, settings))
        if "subfolder" not in settings:
            raise OSError("no config.json")
        return load(folder / "whole", subfolder="vae")

    def loaded(where, **settings):
        asked.append((where, settings))
        return tiny.sd_pipeline(seed=3).vae, {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(module.AutoencoderKL, "load_config", config)
    monkeypatch.setattr(module.AutoencoderKL, "from_pretrained", loaded)
    module.load_vae(
        "user/vae", torch.float16, str(folder / "base"), {"token": "t", "revision": "r", "variant": "fp16"}
    )
    loading = {"dtype": torch.float16, "output_loading_info": True, "use_safetensors": True}
    assert asked == [
        ("user/vae", {"token": "t"}),
        ("user/vae", {"subfolder": "vae", "token": "t"}),
        ("user/vae", {"subfolder": "vae", "token": "t", **loading}),
    ]


def test_mistakes(folder, tmp_path):
    """What is no VAE is refused by name."""
    AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(
        tmp_path / "tiny"
    )
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tiny.sd_pipeline().vae.save_pretrained(tmp_path / "part")
    weights.pop("decoder.conv_out.bias")
    save_file(weights, tmp_path / "part" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    save_file(weights, tmp_path / "part.safetensors")
    for name, message in (
        (tmp_path / "tiny", "a `AutoencoderTiny`. Pass an `AutoencoderKL`"),
        (folder / "base" / "unet", "a `UNet2DConditionModel`. Pass an `AutoencoderKL`"),
        (tmp_path / "part", "The VAE .*missing.*: decoder.conv_out.bias"),
        (tmp_path / "part.safetensors", "decoder.conv_out.bias|cannot be loaded"),
        (tmp_path / "nothing.safetensors", "There is no file"),
        ("/no/such/vae", "There is no folder or file '/no/such/vae'"),
        ("user/nothing", "`vae` is user/nothing, which cannot be loaded"),
        (tmp_path, "`vae` is .*, which cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            load_backbone(folder / "base", vae=name)


def trainer_of(tmp_path, folder, **settings) -> InstanceDPOTrainer:
    lora = settings.pop("peft_config", None)
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST, precompute_dir=str(tmp_path / "cache"), **settings)
    return InstanceDPOTrainer(str(folder / "base"), args=args, train_dataset=tiny.pairs(4), peft_config=lora)


def test_a_training(folder, tmp_path):
    """Its losses are those of a pipeline that has the VAE, precomputed or not; precomputed latents are not those of another VAE."""
    pipeline = load_pipeline(str(folder / "base"))
    pipeline.vae = load_pipeline(str(folder / "whole")).vae
    args = InstanceDPOConfig(str(tmp_path / "out"), beta=50.0, **tiny.FAST)
    whole = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4))
    whole.train()
    latents = {}
    for vae in (None, str(folder / "vae")):
        trainer = trainer_of(tmp_path, folder, beta=50.0, precompute=True, model_init_kwargs=vae and {"vae": vae})
        latents[vae] = torch.as_tensor(trainer.data_collator([trainer.train_dataset[0]])["chosen_latents_mean"])
    assert (latents[None] - latents[vae]).abs().max() > 1e-3
    trainer.train()
    torch.testing.assert_close(
        torch.tensor(tiny.losses(trainer)), torch.tensor(tiny.losses(whole)), rtol=1e-4, atol=1e-5
    )
    with trainer.backbone.encoders_on_device():
        assert difference(trainer.backbone.pipeline.vae, folder) == 0
    trainer.save_model()
    assert difference(DiffusionPipeline.from_pretrained(tmp_path / "out").vae, folder) == 0


def test_the_card(folder, tmp_path, monkeypatch):
    """It names the VAE, and its code loads it where a LoRA was trained; a folder of this machine is not named."""
    for vae, named in (("user/vae", "user/vae"), (str(folder / "vae"), "another VAE")):
        trainer = trainer_of(tmp_path, folder, peft_config=tiny.lora(), model_init_kwargs={"vae": str(folder / "vae")})
        trainer.args.model_init_kwargs["vae"] = vae
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "out" / "README.md").text
        assert f"| vae | {named} |" in card and str(folder) not in card
        assert "from diffusers import AutoencoderKL, AutoPipelineForText2Image" in card
        assert f'vae = AutoencoderKL.from_pretrained("{named}", dtype=torch.float16)\npipeline = ' in card
        assert "vae=vae, dtype=torch.float16)" in card
        compile(card.split("```python")[1].split("```")[0], "card", "exec")
    trainer_of(tmp_path, folder).create_model_card()
    assert "vae" not in ModelCard.load(tmp_path / "out" / "README.md").text.lower()


def test_flags(folder):
    """`--vae` and `--single_file_config` of a training are arguments of loading."""
    args = InstanceDPOConfig("out", model_init_kwargs={"variant": "fp16"})
    get_model(ModelConfig(model_name_or_path="x.safetensors", vae="user/vae", single_file_config="user/base"), args)
    assert args.model_init_kwargs == {"variant": "fp16", "vae": "user/vae", "config": "user/base"}


def test_an_evaluation(folder, tmp_path):
    """Every model draws with the VAE, which the record of the images names with its hash."""
    args = EvaluateArguments(models=[f"m={folder / 'base'}", f"f={folder / 'base.safetensors'}"], base_model=str(folder / "base"), vae=str(folder / "vae"))  # fmt: skip
    for spec in get_models(args):
        assert difference(load_evaluated(spec, torch.float32, torch.device("cpu")).vae, folder) == 0
        assert spec.describe()["vae"] == "vae" and spec.describe()["vae_revision"].startswith("sha256:")
    other = {name: resolve_model("m", str(folder / "base"), vae=str(folder / name)).vae_revision for name in NAMES}
    assert other["vae"] == other["whole"] and len(set(other.values())) == 3
    assert resolve_model("m", str(folder / "base")).describe()["vae"] is None


def test_a_configuration_that_is_not_needed_and_a_loaded_pipeline(folder, caplog):
    """`config` beside a folder, and arguments of loading beside a loaded pipeline, are said to have no effect."""
    load_backbone(folder / "base", config=str(folder / "whole"))
    assert "which is for single files" in caplog.text
    caplog.clear()
    load_backbone(tiny.sd_pipeline(), vae=str(folder / "vae"))
    assert "`model_init_kwargs` (vae) says how to load a model: a loaded pipeline is taken as it is" in caplog.text
