# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from trl_diffusion.backbones import load_backbone
from trl_diffusion.trainer.lora import LORA_WEIGHTS_NAME, find_lora, read_lora


PIPELINES = {family: tiny.PIPELINES[family] for family in ("sd", "sdxl", *tiny.FLOWS)}
INPUTS = {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 12, 16)}


def denoiser_name(pipeline) -> str:
    return "transformer" if hasattr(pipeline, "transformer") else "unet"


def random_lora(pipeline, **config) -> PeftModel:
    """The pipeline's denoiser with a LoRA of random weights."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0"]} | config
    model = get_peft_model(getattr(pipeline, denoiser_name(pipeline)), LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return model


def layers(model: PeftModel) -> dict[str, torch.Tensor]:
    """Its weights, by the names that diffusers gives them."""
    return {name.removeprefix("base_model.model."): x for name, x in get_peft_model_state_dict(model).items()}


def save(folder, family: str = "sd", metadata: bool = True, **config) -> PeftModel:
    pipeline = PIPELINES[family]()
    name, model = denoiser_name(pipeline), random_lora(pipeline, **config)
    described = {f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict()} if metadata else {}
    pipeline.save_lora_weights(str(folder), **{f"{name}_lora_layers": layers(model)}, **described)
    return model


def text_encoder_layers(num: int = 1) -> dict[str, torch.Tensor]:
    names = [f"text_model.encoder.layers.{index}.self_attn.q_proj" for index in range(num)]
    return {
        f"{name}.lora_{x}.weight": torch.ones(2, 16) if x == "A" else torch.ones(16, 2) for name in names for x in "AB"
    }


@torch.no_grad()
def predict(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in INPUTS.items()}
    return model.eval()(timestep=torch.tensor([500]), **inputs).sample


class TestReading:
    @pytest.mark.parametrize("family", PIPELINES)
    def test_what_diffusers_writes(self, tmp_path, family):
        """Weights come by peft's names and bit for bit, with rank, alpha and target modules."""
        model = save(tmp_path, family, r=3, lora_alpha=5)
        weights, config = read_lora(tmp_path)
        expected = get_peft_model_state_dict(model)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert (config.r, config.lora_alpha) == (3, 5)
        assert set(config.target_modules) == {"to_q", "to_out.0"}

    @pytest.mark.parametrize(
        "config",
        [
            {"use_rslora": True},
            {"rank_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}},
            {"alpha_pattern": {"attn2.to_q": 3}},
            {"use_dora": True},
            {"target_modules": ["to_q", "conv1", "time_emb_proj"]},
            {"target_modules": r".*attn2\.to_[kv]"},
            {"lora_dropout": 0.5},
        ],
        ids=lambda config: next(iter(config)),
    )
    def test_a_model_made_from_it_predicts_the_same(self, tmp_path, config):
        """All that bears on a LoRA's strength survives: what is read gives the predictions of what was saved."""
        saved = save(tmp_path, **config)
        weights, config = read_lora(tmp_path)
        read = get_peft_model(tiny.sd_pipeline().unet, config)
        assert not torch.equal(predict(read), predict(saved))
        assert not set_peft_model_state_dict(read, weights).unexpected_keys
        assert torch.equal(predict(read), predict(saved))

    @pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
    @pytest.mark.parametrize("family", PIPELINES)
    def test_diffusers_reads_the_same(self, tmp_path, family, config):
        """The LoRA that is read, on a fresh base, and `load_lora_weights` of the same folder: difference 0."""
        save(tmp_path, family, **config)
        backbone, other = (load_backbone(PIPELINES[family]()) for _ in range(2))
        before = tiny.predictions(backbone, backbone.denoiser)
        other.pipeline.load_lora_weights(tmp_path)
        weights, read = read_lora(tmp_path)
        model = get_peft_model(backbone.denoiser, read)
        assert not set_peft_model_state_dict(model, weights).unexpected_keys
        assert torch.equal(tiny.predictions(backbone, model), tiny.predictions(backbone, other.denoiser))
        assert (tiny.predictions(backbone, model) - before).abs().max() > 1e-3

    def test_weights_in_half_precision_stay_so(self, tmp_path):
        """The reader converts nothing."""
        model = save(tmp_path)
        tiny.sd_pipeline().save_lora_weights(
            str(tmp_path),
            unet_lora_layers={name: x.bfloat16() for name, x in layers(model).items()},
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        assert {x.dtype for x in read_lora(tmp_path)[0].values()} == {torch.bfloat16}

    @pytest.mark.parametrize("convert", [str, lambda path: path], ids=["str", "path"])
    def test_folders(self, tmp_path, convert):
        """A folder is a string or a `Path`."""
        save(tmp_path)
        assert find_lora(convert(tmp_path)) == tmp_path / LORA_WEIGHTS_NAME
        assert read_lora(convert(tmp_path))[1].r == 4

    def test_a_later_save_is_what_is_read(self, tmp_path):
        """A folder that was written twice holds the second LoRA alone."""
        save(tmp_path, r=4)
        save(tmp_path, r=2, target_modules=["to_k"])
        weights, config = read_lora(tmp_path)
        assert config.r == 2 and set(config.target_modules) == {"to_k"}
        assert all("to_k" in name for name in weights)


class TestRefused:
    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.bin", None])
    def test_a_folder_without_the_file(self, tmp_path, name):
        """The message names folder and file."""
        if name:
            (tmp_path / name).write_bytes(b"")
        for function in (find_lora, read_lora):
            with pytest.raises(ValueError, match=f"The folder {tmp_path} holds no LoRA \\({LORA_WEIGHTS_NAME}\\)"):
                function(tmp_path)

    def test_without_configuration(self, tmp_path):
        """A file whose header has no configuration is refused, and the message says how to save it."""
        save(tmp_path, metadata=False)
        with pytest.raises(ValueError, match="does not hold its configuration") as error:
            read_lora(tmp_path)
        assert "save_lora_weights(..., unet_lora_adapter_metadata=config.to_dict())" in str(error.value)
        assert str(tmp_path) in str(error.value)

    def test_what_the_message_says_works(self, tmp_path):
        """Saved again as the message says, the LoRA is read."""
        model = save(tmp_path, metadata=False)
        tiny.sd_pipeline().save_lora_weights(
            str(tmp_path),
            unet_lora_layers=layers(model),
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        assert read_lora(tmp_path)[1].lora_alpha == 8

    @pytest.mark.parametrize("denoiser", [True, False], ids=["both", "text encoder alone"])
    def test_text_encoder(self, tmp_path, denoiser):
        """A LoRA that adapts the text encoder, beside the denoiser or alone, is refused with its name."""
        described = LoraConfig(r=2, target_modules=["q_proj"]).to_dict()
        model = random_lora(tiny.sd_pipeline())
        own = {"unet_lora_layers": layers(model), "unet_lora_adapter_metadata": model.peft_config["default"].to_dict()}
        tiny.sd_pipeline().save_lora_weights(
            str(tmp_path),
            text_encoder_lora_layers=text_encoder_layers(),
            text_encoder_lora_adapter_metadata=described,
            **(own if denoiser else {}),
        )
        with pytest.raises(ValueError, match="text_encoder"):
            read_lora(tmp_path)

    def test_two_text_encoders(self, tmp_path):
        """All that it adapts is listed."""
        model = random_lora(tiny.sdxl_pipeline())
        tiny.sdxl_pipeline().save_lora_weights(
            str(tmp_path),
            unet_lora_layers=layers(model),
            text_encoder_lora_layers=text_encoder_layers(),
            text_encoder_2_lora_layers=text_encoder_layers(),
        )
        with pytest.raises(ValueError, match="adapts more than a denoiser: text_encoder, text_encoder_2, unet"):
            read_lora(tmp_path)

    def test_another_librarys_names(self, tmp_path):
        """Names as kohya's scripts write them: the message speaks of the format, and does not list every module."""
        weights = {}
        for name, weight in layers(random_lora(tiny.sd_pipeline())).items():
            module, kind, _ = name.rsplit(".", 2)
            name = f"lora_unet_{module.replace('.', '_')}"
            weights[f"{name}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = weight
            weights[f"{name}.alpha"] = torch.tensor(4.0)
        save_file(weights, tmp_path / LORA_WEIGHTS_NAME)
        with pytest.raises(ValueError) as error:
            read_lora(tmp_path)
        assert len(str(error.value)) < 500
        assert "diffusers" in str(error.value)

    @pytest.mark.parametrize(
        "content",
        [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", None],
        ids=["empty", "git-lfs pointer", "truncated"],
    )
    def test_a_broken_file(self, tmp_path, content):
        """A file that was not downloaded, or not to its end, is a ValueError that names it."""
        save(tmp_path)
        path = tmp_path / LORA_WEIGHTS_NAME
        path.write_bytes(path.read_bytes()[:-100] if content is None else content)
        with pytest.raises(ValueError, match=str(path)):
            read_lora(tmp_path)

    def test_a_configuration_of_a_newer_peft(self, tmp_path):
        """A field that this peft does not know is a ValueError that names the file and the field."""
        save(tmp_path)
        path = tmp_path / LORA_WEIGHTS_NAME
        described = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"], "unet.of_the_future": 1}
        save_file(load_file(path), path, {"format": "pt", "lora_adapter_metadata": json.dumps(described)})
        with pytest.raises(ValueError, match="of_the_future") as error:
            read_lora(tmp_path)
        assert str(path) in str(error.value) and "peft" in str(error.value)

    def test_an_empty_file(self, tmp_path):
        """A file with a configuration and no weights is refused as such."""
        save_file({}, tmp_path / LORA_WEIGHTS_NAME, {"lora_adapter_metadata": json.dumps({"unet.r": 4})})
        with pytest.raises(ValueError, match="holds no weights") as error:
            read_lora(tmp_path)
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights, a, b: weights.update({a: weights[a] * float("nan")}), "not finite, in '{a}'"),
            (lambda weights, a, b: weights[b].__setitem__((0, 0), float("inf")), "not finite, in '{b}'"),
            (lambda weights, a, b: weights.pop(a), "not whole: .*lacks 'lora_A.weight'"),
            (lambda weights, a, b: weights.pop(b), "not whole: .*lacks 'lora_B.weight'"),
            (lambda weights, a, b: weights.update({a: weights[a][:2].clone()}), "rank 2, 4 at .* and 4 in its"),
            (
                lambda weights, a, b: weights.update({a: weights[a][:2].clone(), b: weights[b][:, :2].clone()}),
                "rank 2 at .* and 4 in its configuration",
            ),
            (
                lambda weights, a, b: weights.update({"unet.mid_block.alpha": torch.ones(1)}),
                "names of another library",
            ),
            (
                lambda weights, a, b: weights.update({a.replace("lora_A", "lora.down"): weights.pop(a)}),
                "names of another library",
            ),
            (lambda weights, a, b: weights.update({"unet.conv_in.bias": torch.ones(8)}), "holds 'conv_in.bias'"),
            (
                lambda weights, a, b: weights.update({b.replace("weight", "bias"): torch.ones(8)}),
                "which a LoRA of its configuration has not",
            ),
        ],
        ids=["nan", "infinite", "no A", "no B", "rank of A", "rank", "alpha", "older diffusers", "bias", "bias of B"],
    )
    def test_other_weights_than_the_configuration_says(self, tmp_path, change, message):
        """Weights must be whole, finite and of the ranks that the header names, or the message says where they are not."""
        save(tmp_path)
        path = tmp_path / LORA_WEIGHTS_NAME
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        weights = load_file(path)
        a = sorted(weights)[0]
        b = a.replace("lora_A", "lora_B")
        change(weights, a, b)
        save_file(weights, path, header)
        message = message.format(a=a.removeprefix("unet."), b=b.removeprefix("unet."))
        with pytest.raises(ValueError, match=message) as error:
            read_lora(tmp_path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("header", ["{", '{"unet.layers_pattern": "blocks"}'], ids=["no JSON", "contradictory"])
    def test_a_broken_configuration(self, tmp_path, header):
        """A header that is no configuration is a ValueError that names the file."""
        save(tmp_path)
        path = tmp_path / LORA_WEIGHTS_NAME
        save_file(load_file(path), path, {"lora_adapter_metadata": header})
        with pytest.raises(ValueError, match=f"LoRA {path} cannot be"):
            read_lora(tmp_path)

    @pytest.mark.parametrize("name", ["user/no-such-lora", "no-such-lora", "/no/such/folder", "../no/such/folder"])
    def test_neither_folder_nor_hub_id(self, name, tmp_path, monkeypatch):
        """Offline, an id that was never downloaded is a ValueError with the name, the file and what to do."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ValueError, match=f"^{name} is no folder, and the Hub gave no {LORA_WEIGHTS_NAME}"
        ) as error:
            find_lora(name)
        remedy = "must be in the form" if "/no/" in name else "check your connection"
        assert remedy in str(error.value)

    def test_the_file_itself(self, tmp_path):
        """The path of the file in place of its folder is refused as what it is: a file, and no id on the Hub."""
        save(tmp_path)
        with pytest.raises(ValueError, match="is a file.*folder") as error:
            find_lora(tmp_path / LORA_WEIGHTS_NAME)
        assert "the Hub gave no" not in str(error.value)
