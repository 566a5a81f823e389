# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.evaluation.test_card import model_facts
from tests.original_layouts import sd_file
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, negative_preference_guidance
from trl_diffusion.cards.facts import write_facts
from trl_diffusion.evaluation import kinds, models
from trl_diffusion.evaluation.models import (
    default_guidance,
    guidance_of,
    load_pipeline,
    parse_model,
    pipeline_class_of,
    resolve_dtype,
    resolve_model,
)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A pipeline and two LoRAs for it."""
    root = tmp_path_factory.mktemp("models")
    tiny.sd_pipeline().save_pretrained(root / "base")
    save_lora(tiny.sd_pipeline(), root / "lora", seed=1)
    save_lora(tiny.sd_pipeline(), root / "reversed", seed=2, r=2, alpha=3)
    return {name: str(root / name) for name in ("base", "lora", "reversed")}


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline("a red circle", generator=generator, **settings).images[0]


def card(folder: Path, base_model: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nbase_model: {base_model}\n---\n\n# A LoRA\n")


class TestNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("dpo=user/name", ("dpo", "user/name")),
            ("user/sd-1.5", ("sd-1.5", "user/sd-1.5")),
            ("runs/x/checkpoint-200/", ("checkpoint-200", "runs/x/checkpoint-200/")),
            ("a=runs/lr=1e-5", ("a", "runs/lr=1e-5")),
        ],
    )
    def test_names(self, text, expected):
        """The name is before the first '='; without '=', it is the last part of the path."""
        assert parse_model(text) == expected

    @pytest.mark.parametrize("text", ["runs/lr=1e-5", "=x", "a b=x", "../x=y"])
    def test_names_that_no_folder_can_have(self, text):
        """A name that is not valid for a folder is refused with the expected format."""
        with pytest.raises(ValueError, match="Write NAME=WHERE"):
            parse_model(text)

    def test_no_model(self):
        """A name without a model is refused."""
        with pytest.raises(ValueError, match="has no model: write NAME=WHERE"):
            parse_model("dpo=")


class TestKinds:
    def test_a_pipeline(self, folders):
        """A folder with `model_index.json` is a pipeline, whose revision is a hash of its files; it needs no base."""
        spec = resolve_model("m", folders["base"], base="ignored")
        assert (spec.kind, spec.base, spec.negative_lora) == ("pipeline", None, None)
        assert spec.revision.startswith("sha256:")

    def test_what_lies_beside_a_pipeline_does_not_count(self, tmp_path):
        """The hash changes with weights and settings of the pipeline, not with a training state or samples in its
        folder."""
        tiny.sd_pipeline().save_pretrained(tmp_path / "m")
        before = resolve_model("m", str(tmp_path / "m")).revision
        (tmp_path / "m" / "optimizer.pt").write_bytes(b"state")
        (tmp_path / "m" / "images").mkdir()
        (tmp_path / "m" / "images" / "x_0.png").write_bytes(b"png")
        assert resolve_model("m", str(tmp_path / "m")).revision == before
        config = tmp_path / "m" / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace("epsilon", "v_prediction"))
        assert resolve_model("m", str(tmp_path / "m")).revision != before

    def test_other_weights_are_another_revision(self, tmp_path):
        """The revision of a LoRA is the hash of its weights."""
        revisions = set()
        for seed in (0, 1, 0):
            tiny.sd_pipeline(seed=seed).save_pretrained(tmp_path / "m")
            revisions.add(resolve_model("m", str(tmp_path / "m")).revision)
        assert len(revisions) == 2

    def test_a_lora(self, folders):
        """A LoRA and its base each have a revision."""
        spec = resolve_model("m", folders["lora"], base=folders["base"], negative_lora=folders["reversed"])
        assert (spec.kind, spec.base, spec.negative_lora) == ("lora", folders["base"], folders["reversed"])
        assert spec.base_revision == resolve_model("b", folders["base"]).revision
        other = resolve_model("m", folders["reversed"], base=folders["base"])
        assert spec.negative_lora_revision == other.revision != spec.revision

    def test_moving_a_folder_changes_no_description(self, folders, tmp_path, monkeypatch):
        """A folder is described by the last part of its path and a hash of its content."""
        described = resolve_model("m", folders["lora"], base=folders["base"]).describe()
        assert described["path"] == "lora" and described["base"] == "base"
        monkeypatch.chdir(Path(folders["base"]).parent)
        assert resolve_model("other", "lora/", base="./base").describe() == described

    def test_a_base_out_of_the_card(self, folders, tmp_path):
        """The base is the `base_model` of the card, which for a checkpoint is one folder up; an explicit base
        overrides it."""
        out = tmp_path / "out"
        for folder in (out, out / "checkpoint-200", out / "elsewhere"):
            save_lora(tiny.sd_pipeline(), folder)
        card(out, folders["base"])
        assert resolve_model("m", str(out)).base == folders["base"]
        assert resolve_model("m", str(out / "checkpoint-200")).base == folders["base"]
        other = str(tmp_path / "other")
        tiny.sd_pipeline(seed=1).save_pretrained(other)
        assert resolve_model("m", str(out), base=other).base == other
        with pytest.raises(ValueError, match="has no README.md that names one `base_model`. Pass"):
            resolve_model("m", str(out / "elsewhere"))

    def test_of_several_bases_the_one_that_was_trained(self, folders, tmp_path):
        """A card also names the LoRA that a training started at; what was written of the training says which of them is the base."""
        save_lora(tiny.sd_pipeline(), tmp_path / "lora")
        card(tmp_path / "lora", f"[{folders['base']}, c/d]")
        write_facts(model_facts(base=folders["base"]), tmp_path / "lora" / "training.json")
        assert resolve_model("m", str(tmp_path / "lora")).base == folders["base"]

    @pytest.mark.parametrize("base_model", ["[a/b, c/d]", "null", "[]"])
    def test_a_card_that_names_no_single_base(self, tmp_path, base_model):
        """If the base of a LoRA is unknown, the error asks for it."""
        save_lora(tiny.sd_pipeline(), tmp_path / "lora")
        card(tmp_path / "lora", base_model)
        with pytest.raises(ValueError, match="names one `base_model`"):
            resolve_model("m", str(tmp_path / "lora"))

    def test_images(self, tmp_path):
        """A folder with images, or with a list of them, is a folder of images, whose revision is a hash of its
        files."""
        tiny.image(0).save(tmp_path / "00000_0.JPG", format="jpeg")
        spec = resolve_model("m", str(tmp_path))
        assert spec.kind == "images" and spec.revision.startswith("sha256:")
        (tmp_path / "00000_0.JPG").rename(tmp_path / "00001_0.jpg")
        assert resolve_model("m", str(tmp_path)).revision != spec.revision

    def test_a_lora_with_samples_beside_it(self, folders, tmp_path):
        """A folder with weights and images is not a folder of images."""
        save_lora(tiny.sd_pipeline(), tmp_path)
        tiny.image(0).save(tmp_path / "sample.png")
        assert resolve_model("m", str(tmp_path), base=folders["base"]).kind == "lora"

    def test_mistakes(self, folders, tmp_path):
        """Each error names the expected files, or the mistake."""
        with pytest.raises(
            ValueError, match="no model_index.json .*, no pytorch_lora_weights.safetensors .* and no images"
        ):
            resolve_model("m", str(tmp_path))
        with pytest.raises(ValueError, match="provides neither model_index.json nor pytorch_lora_weights.safetensors"):
            resolve_model("m", "user/no-such-model")
        with pytest.raises(ValueError, match="'/no/such/folder' cannot be evaluated: there is no such folder"):
            resolve_model("m", "/no/such/folder")
        with pytest.raises(ValueError, match="The base of the LoRA .* must be a pipeline"):
            resolve_model("m", folders["lora"], base=folders["reversed"])
        with pytest.raises(ValueError, match="`negative_lora_on` is 'top', and must be one of aligned, base"):
            resolve_model("m", folders["lora"], folders["base"], folders["reversed"], negative_lora_on="top")
        with pytest.raises(ValueError, match="is no LoRA: its weights are not apart from its base's"):
            resolve_model("m", folders["base"], negative_lora=folders["reversed"], negative_lora_on="base")
        with pytest.raises(ValueError, match="`negative_lora` must be a LoRA"):
            resolve_model("m", folders["base"], negative_lora=folders["base"])
        tiny.sd_pipeline().save_pretrained(tmp_path)
        save_lora(tiny.sd_pipeline(), tmp_path)
        with pytest.raises(ValueError, match="holds both a pipeline .* and a LoRA"):
            resolve_model("m", str(tmp_path))
        (tmp_path / "images").mkdir()
        tiny.image(0).save(tmp_path / "images" / "a_0.png")
        with pytest.raises(ValueError, match="`negative_lora` cannot change them"):
            resolve_model("m", str(tmp_path / "images"), negative_lora=folders["reversed"])

    def test_on_the_hub(self, tmp_path, monkeypatch):
        """The kind of a repository depends on its files, its revision is the commit, and the card of a LoRA is read
        from it."""
        root = tmp_path / "hub"
        for repo_id, filename in (
            ("user/base", "model_index.json"),
            ("user/lora", "pytorch_lora_weights.safetensors"),
            ("user/lora", "README.md"),
        ):
            path = root / repo_id / "snapshots" / COMMIT / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("---\nbase_model: user/base\n---\n")

        def download(repo_id, filename):
            path = root / repo_id / "snapshots" / COMMIT / filename
            if not path.exists():
                raise EntryNotFoundError(f"no {filename}")
            return str(path)

        for module in (models, kinds):
            monkeypatch.setattr(module, "hf_hub_download", download)
        spec = resolve_model("m", "user/lora")
        assert (spec.kind, spec.path, spec.revision) == ("lora", "user/lora", COMMIT)
        assert (spec.base, spec.base_revision) == ("user/base", COMMIT)
        assert resolve_model("m", "user/base").kind == "pipeline"


class TestSampleModel:
    def test_it_draws_in_place_of_the_base(self, folders, tmp_path):
        """Images are those of the LoRA on the sample model; the report names both, and moving what it was trained on changes no image."""
        turbo = str(tmp_path / "turbo")
        tiny.sd_pipeline(seed=1).save_pretrained(turbo)
        shutil.copytree(folders["lora"], tmp_path / "lora")
        lora = str(tmp_path / "lora")
        with pytest.raises(ValueError, match="names one `base_model`"):
            resolve_model("m", lora)
        unknown = resolve_model("m", lora, sample_model=turbo)
        card(tmp_path / "lora", "user/base")
        carded = resolve_model("m", lora, negative_lora=folders["reversed"], sample_model=turbo)
        given = resolve_model("m", lora, base=folders["base"], sample_model=turbo)
        for spec, trained_on in ((unknown, None), (carded, "user/base"), (given, "base")):
            assert (spec.base, spec.base_revision) == (turbo, resolve_model("t", turbo).revision)
            assert spec.record().get("trained_on") == trained_on and spec.describe()["base"] == "turbo"
        assert unknown.describe() == given.describe() == resolve_model("m", lora, base=turbo).describe()
        drawn = draw(load_pipeline(given, torch.float32, CPU))
        plain = StableDiffusionPipeline.from_pretrained(turbo)
        without = draw(plain)
        plain.load_lora_weights(lora)
        assert np.array_equal(drawn, draw(plain)) and abs(drawn - without).max() > 1e-2

    def test_pipelines_draw_by_themselves(self, folders, tmp_path):
        """A sample model changes neither a pipeline nor a folder of images; one that is no pipeline is refused."""
        tiny.image(0).save(tmp_path / "00000_0.png")
        for where in (folders["base"], str(tmp_path)):
            assert resolve_model("m", where, sample_model=folders["base"]) == resolve_model("m", where)
        with pytest.raises(ValueError, match="The sample model for the LoRA .* must be a pipeline, but"):
            resolve_model("m", folders["lora"], folders["base"], sample_model=folders["reversed"])


class TestSingleFiles:
    def test_a_file_is_a_pipeline(self, folders, tmp_path):
        """Its revision is its hash, its configuration that of `base`, and it loads as the model that it was made from."""
        file = tmp_path / "model.safetensors"
        save_file(sd_file(), file)
        spec = resolve_model("m", str(file), base=folders["base"])
        assert (spec.kind, spec.base) == ("pipeline", folders["base"]) and spec.revision.startswith("sha256:")
        assert spec.describe()["path"] == "model.safetensors" and spec.describe()["base"] == "base"
        assert pipeline_class_of(spec) is StableDiffusionPipeline
        loaded, expected = (
            load_pipeline(one, torch.float32, CPU) for one in (spec, resolve_model("b", folders["base"]))
        )
        assert np.array_equal(draw(loaded), draw(expected))
        save_file({"x": torch.zeros(1)}, file)
        assert resolve_model("m", str(file)).revision != spec.revision
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match="model.bin is a file: pass its folder"):
            resolve_model("m", str(tmp_path / "model.bin"))


class TestClasses:
    def test_defaults_of_the_pipelines(self, folders, tmp_path):
        """The class is read before anything is loaded, for a LoRA that of its base; the scales are those of diffusers."""
        for spec in (resolve_model("m", folders["base"]), resolve_model("m", folders["lora"], folders["base"])):
            assert pipeline_class_of(spec) is StableDiffusionPipeline
        classes = StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline
        assert [default_guidance(one) for one in classes] == [7.5, 5.0, 7.0, 3.5]


class TestLoading:
    def test_a_lora_keeps_its_strength(self, folders):
        """A LoRA whose alpha is not its rank gives the same images as in plain diffusers."""
        pipeline = load_pipeline(resolve_model("m", folders["lora"], base=folders["base"]), torch.float32, CPU)
        plain = StableDiffusionPipeline.from_pretrained(folders["base"])
        without = draw(plain)
        plain.load_lora_weights(folders["lora"])
        assert {layer.scaling["evaluated"] for layer in pipeline.unet.modules() if hasattr(layer, "lora_A")} == {2.0}
        assert np.array_equal(draw(pipeline), draw(plain))
        assert abs(draw(pipeline) - without).max() > 1e-2

    @pytest.mark.parametrize(
        ("kind", "on", "negative"),
        [
            ("lora", "aligned", {"a": 1.0, "b": 1.0}),
            ("lora", "base", {"b": 1.0}),
            ("pipeline", "aligned", {"b": 1.0}),
        ],
    )
    def test_a_negative_lora(self, folders, kind, on, negative):
        """It comes on top of the model, or on the base alone; a model's images are those of these adapters in plain diffusers."""
        where, base = (folders["lora"], folders["base"]) if kind == "lora" else (folders["base"], None)
        spec = resolve_model("m", where, base, negative_lora=folders["reversed"], negative_lora_on=on)
        assert spec.describe().get("negative_lora_on") == (on if kind == "lora" else None)
        pipeline = load_pipeline(spec, torch.float32, CPU)
        with guidance_of(spec, pipeline):
            drawn = draw(pipeline)
        plain = StableDiffusionPipeline.from_pretrained(folders["base"])
        plain.load_lora_weights(folders["lora"], adapter_name="a")
        plain.load_lora_weights(folders["reversed"], adapter_name="b")
        with negative_preference_guidance(plain, "a" if kind == "lora" else None, negative):
            assert np.array_equal(drawn, draw(plain))
        spec = resolve_model("m", where, base)
        pipeline = load_pipeline(spec, torch.float32, CPU)
        with guidance_of(spec, pipeline):
            assert abs(drawn - draw(pipeline)).max() > 1e-2

    def test_a_safety_checker_is_left_out(self, tmp_path, caplog):
        """The checker is not loaded, with a warning if there is one."""
        pipeline = tiny.sd_pipeline()
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8
        )
        StableDiffusionPipeline(
            **{**pipeline.components, "safety_checker": StableDiffusionSafetyChecker(config)}
            | {"feature_extractor": CLIPImageProcessor(size=32, crop_size=32)},
        ).save_pretrained(tmp_path)
        assert StableDiffusionPipeline.from_pretrained(tmp_path).safety_checker is not None
        with caplog.at_level(logging.WARNING):
            loaded = load_pipeline(resolve_model("m", str(tmp_path)), torch.float32, CPU)
        assert loaded.safety_checker is None and "safety checker" in caplog.text
        caplog.clear()
        pipeline.save_pretrained(tmp_path / "without")
        load_pipeline(resolve_model("m", str(tmp_path / "without")), torch.float32, CPU)
        assert "safety checker" not in caplog.text

    @pytest.mark.parametrize("peft_config", [tiny.lora(4, 16), None], ids=["lora", "full"])
    def test_a_checkpoint_of_a_training(self, tmp_path, folders, peft_config):
        """A trainer's `checkpoint-2` is a model with exactly the trained weights."""
        args = InstanceDPOConfig(
            str(tmp_path / "out"), **tiny.FAST | {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
        )
        trainer = InstanceDPOTrainer(
            folders["base"], args=args, train_dataset=tiny.pairs(4, False), peft_config=peft_config
        )
        trainer.train()
        spec = resolve_model("m", str(tmp_path / "out" / "checkpoint-2"), base=folders["base"])
        assert spec.kind == ("lora" if peft_config else "pipeline")
        pipeline = load_pipeline(spec, torch.float32, CPU)
        trained = trainer.accelerator.unwrap_model(trainer.model).eval()
        inputs = {
            "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.ones(1, 12, 16),
        }
        with torch.no_grad():
            outputs = [unet(**inputs).sample for unet in (pipeline.unet, trained, tiny.sd_pipeline().unet)]
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
        assert (outputs[0] - outputs[2]).abs().max() > 1e-4


class TestTypes:
    def test_types(self):
        """The data type is given by name; by default, it is half precision on a CUDA device and single elsewhere."""
        assert resolve_dtype("auto", torch.device("cuda", 1), StableDiffusionPipeline) == torch.float16
        for family in (StableDiffusion3Pipeline, FluxPipeline):  # float16 is too narrow for T5
            assert resolve_dtype("auto", torch.device("cuda"), family) == torch.bfloat16
            assert resolve_dtype("float16", torch.device("cuda"), family) == torch.float16
        for device in (CPU, torch.device("mps")):
            assert resolve_dtype("auto", device, StableDiffusionPipeline) == torch.float32
            assert resolve_dtype("auto", device, FluxPipeline) == torch.float32
        assert resolve_dtype("bfloat16", CPU, StableDiffusionPipeline) == torch.bfloat16
        with pytest.raises(ValueError, match="`dtype` is 'int8'. Pass `auto`, 'float32'"):
            resolve_dtype("int8", CPU, StableDiffusionPipeline)

    def test_a_pipeline_is_loaded_in_its_type(self, folders):
        """All weights have the data type, including those of a LoRA."""
        pipeline = load_pipeline(resolve_model("m", folders["lora"], folders["base"]), torch.bfloat16, CPU)
        assert {weight.dtype for weight in pipeline.unet.parameters()} == {torch.bfloat16}
