# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.families import FAMILIES
from trl_diffusion import sampling
from trl_diffusion.backbones import StableDiffusionBackbone
from trl_diffusion.evaluation import generate as module
from trl_diffusion.evaluation.generate import generate, match_images, sample_rows, set_scheduler
from trl_diffusion.evaluation.models import ModelSpec, guidance_of, load_pipeline, resolve_model
from trl_diffusion.evaluation.prompts import Prompt, PromptSet
from trl_diffusion.evaluation.protocols import Protocol
from trl_diffusion.randomness import keyed_generator


TEXTS = ["a red circle", "a blue square", "a cat", "a dog", "a cat and a dog"]
PROMPTS = PromptSet("tiny", None, "sha256:0", tuple(Prompt(f"p-{n}", text) for n, text in enumerate(TEXTS)))
PROTOCOL = Protocol(num_inference_steps=2, guidance_scale=3.0, images_per_prompt=2)
PIPELINES = {"sd": tiny.sd_pipeline, "sdxl": tiny.sdxl_pipeline}


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> dict[str, ModelSpec]:
    """Two families, and LoRAs on the first: one that changes nothing, one that does, one for the unconditional branch."""
    root = tmp_path_factory.mktemp("models")
    for family, make in PIPELINES.items():
        make().save_pretrained(root / family)
    for name, settings in {"nothing": {"size": 0}, "lora": {"seed": 1}, "reversed": {"seed": 2}}.items():
        save_lora(tiny.sd_pipeline(), root / name, **settings)
    base = str(root / "sd")
    return {
        "sd": resolve_model("sd", base),
        "sdxl": resolve_model("sdxl", str(root / "sdxl")),
        "nothing": resolve_model("nothing", str(root / "nothing"), base),
        "lora": resolve_model("lora", str(root / "lora"), base),
        "guided": resolve_model("guided", str(root / "lora"), base, str(root / "reversed")),
    }


def run(spec: ModelSpec, output_dir: Path, prompts: PromptSet = PROMPTS, protocol: Protocol = PROTOCOL, batch_size=1):
    return generate(spec, prompts, protocol, output_dir, batch_size, use_cpu=True, disable_tqdm=True)


def files(folder: Path) -> dict[str, bytes]:
    """All images in a folder and its subfolders."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def drawn(specs, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The images of an uninterrupted run at batch size 1."""
    made = {}
    for name in specs:
        folder = tmp_path_factory.mktemp(name)
        run(specs[name], folder)
        made[name] = files(folder)
    return made


class TestDrawing:
    @pytest.mark.parametrize("family", PIPELINES)
    def test_files_and_rows(self, specs, drawn, tmp_path, family):
        """Each prompt and index has an image at its path, in the model's size, and no two images are equal."""
        rows = run(specs[family], tmp_path)
        assert [(row.prompt.id, row.index) for row in rows] == [(f"p-{n}", i) for n in range(5) for i in range(2)]
        for row in rows:
            assert row.path == tmp_path / "images" / family / f"{row.prompt.id}_{row.index}.png"
            assert row.path.read_bytes() == drawn[family][row.path.name]
        with Image.open(rows[0].path) as image:
            assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
        assert len(set(drawn[family].values())) == 10

    @pytest.mark.parametrize("family", PIPELINES)
    def test_an_image_is_the_pipelines_own(self, specs, drawn, tmp_path, family):
        """An image is the result of a plain call with the noise of (seed, prompt id, index)."""
        pipeline = load_pipeline(specs[family], torch.float32, torch.device("cpu"))
        pipeline.set_progress_bar_config(disable=True)
        generator = keyed_generator(0, "p-3/1", "sample")
        pipeline(TEXTS[3], num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0].save(
            tmp_path / "x.png"
        )
        assert (tmp_path / "x.png").read_bytes() == drawn[family]["p-3_1.png"]

    def test_neither_order_nor_company_matters(self, specs, drawn, tmp_path):
        """Images do not depend on the selection and order of prompts."""
        few = replace(PROMPTS, prompts=(PROMPTS.prompts[3], PROMPTS.prompts[0]))
        rows = run(specs["sd"], tmp_path, few, replace(PROTOCOL, images_per_prompt=1))
        assert [row.path.name for row in rows] == ["p-3_0.png", "p-0_0.png"]
        assert files(tmp_path) == {name: drawn["sd"][name] for name in ("p-3_0.png", "p-0_0.png")}

    @pytest.mark.parametrize("batch_size", [3, 16])
    @pytest.mark.parametrize("family", PIPELINES)
    def test_the_batch_size_does_not_matter(self, specs, drawn, tmp_path, family, batch_size):
        """With batches, no pixel changes by more than one level, because of rounding."""
        for row in run(specs[family], tmp_path, batch_size=batch_size):
            one = tmp_path / "one.png"
            one.write_bytes(drawn[family][row.path.name])
            pixels = [np.asarray(Image.open(path)).astype(int) for path in (one, row.path)]
            assert abs(pixels[0] - pixels[1]).max() <= 1

    def test_models_start_from_the_same_noise(self, drawn):
        """A LoRA of zeros gives exactly the images of the base; another LoRA changes every image."""
        assert drawn["nothing"] == drawn["sd"]
        assert all(drawn["lora"][name] != drawn["sd"][name] for name in drawn["sd"])

    def test_a_negative_lora(self, specs, drawn, tmp_path):
        """The negative LoRA is used for every image, as in `negative_preference_guidance`."""
        assert all(drawn["guided"][name] != drawn["lora"][name] for name in drawn["lora"])
        pipeline = load_pipeline(specs["guided"], torch.float32, torch.device("cpu"))
        pipeline.set_progress_bar_config(disable=True)
        generator = keyed_generator(0, "p-0/0", "sample")
        with guidance_of(specs["guided"], pipeline):
            image = pipeline(TEXTS[0], num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
        image.save(tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes() == drawn["guided"]["p-0_0.png"]

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"num_inference_steps": 3}, {"guidance_scale": 5.0}, {"scheduler": "EulerDiscreteScheduler"}],
    )
    def test_settings_of_the_protocol_count(self, specs, drawn, tmp_path, change):
        """Each setting changes every image."""
        few = replace(PROMPTS, prompts=PROMPTS.prompts[:2])
        run(specs["sd"], tmp_path, few, replace(PROTOCOL, **change))
        assert all(content != drawn["sd"][name] for name, content in files(tmp_path).items())

    def test_the_size(self, specs, tmp_path):
        """Images have the height and width of the protocol."""
        one = replace(PROMPTS, prompts=PROMPTS.prompts[:1])
        row, _ = run(specs["sd"], tmp_path, one, replace(PROTOCOL, height=48, width=64))
        assert Image.open(row.path).size == (64, 48)

    def test_schedulers(self):
        """The named scheduler keeps the noise schedule; one that does not fit is refused with those that fit."""
        pipeline = tiny.sd_pipeline("v_prediction")
        before = pipeline.scheduler
        set_scheduler(pipeline, None)
        assert pipeline.scheduler is before
        set_scheduler(pipeline, "DPMSolverMultistepScheduler")
        assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        with pytest.raises(ValueError, match="'FlowMatchEulerDiscreteScheduler' does not fit .* DDIMScheduler"):
            set_scheduler(pipeline, "FlowMatchEulerDiscreteScheduler")

    def test_no_batches(self, specs, tmp_path):
        """A batch size of 0 is refused before anything is written."""
        with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
            run(specs["sd"], tmp_path, batch_size=0)
        assert not any(tmp_path.iterdir())


FLOW = {"sd3": tiny.sd3_pipeline, "flux": tiny.flux_pipeline}
FLOW_PROTOCOL = replace(PROTOCOL, height=32, width=32, max_sequence_length=16)


@pytest.fixture(scope="module")
def flow_specs(tmp_path_factory) -> dict[str, ModelSpec]:
    """Of both flow families a pipeline, a LoRA on it, and the same with another one in the unconditional branch."""
    root, specs = tmp_path_factory.mktemp("flow"), {}
    for family, make in FLOW.items():
        make().save_pretrained(root / family)
        for seed, name in enumerate(("lora", "reversed")):
            save_lora(make(), root / f"{family}-{name}", seed=seed, size=1.0)
        base, lora, reversed_lora = (str(root / name) for name in (family, f"{family}-lora", f"{family}-reversed"))
        specs[family] = resolve_model(family, base)
        specs[f"{family}-lora"] = resolve_model("lora", lora, base)
        specs[f"{family}-guided"] = resolve_model("guided", lora, base, reversed_lora)
    return specs


@pytest.mark.parametrize("family", FLOW)
class TestFlowModels:
    few = replace(PROMPTS, prompts=PROMPTS.prompts[:3])

    def protocol(self, family: str, **settings) -> Protocol:
        guidance = {"guidance_scale": None, "true_cfg_scale": 2.0} if family == "flux" else {"guidance_scale": 3.0}
        return replace(FLOW_PROTOCOL, **{"images_per_prompt": 1} | guidance | settings)

    @pytest.mark.parametrize("kind", ["", "-lora", "-guided"])
    def test_an_image_is_the_pipelines_own(self, flow_specs, tmp_path, family, kind):
        """For a pipeline, a LoRA and one with a negative LoRA: the plain call, with the noise of the image, in any batch."""
        spec = flow_specs[family + kind]
        rows = run(spec, tmp_path / "all", self.few, self.protocol(family), batch_size=2)
        pipeline = load_pipeline(spec, torch.float32, torch.device("cpu"))
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2}
        settings |= {"negative_prompt": "", "true_cfg_scale": 2.0} if family == "flux" else {"guidance_scale": 3.0}
        with guidance_of(spec, pipeline):
            for row in rows:
                generator = keyed_generator(0, f"{row.prompt.id}/0", "sample")
                image = pipeline(row.prompt.text, generator=generator, **settings).images[0]
                assert abs(np.asarray(image).astype(int) - np.asarray(Image.open(row.path))).max() <= 1

    def test_every_setting_changes_the_images(self, flow_specs, tmp_path, family):
        """Guidance, tokens, the LoRA and the negative LoRA."""
        changes = {"plain": {}, "tokens": {"max_sequence_length": 12}, "guidance": {"guidance_scale": 5.0}}
        if family == "flux":
            changes["true guidance"] = {"true_cfg_scale": 3.0}
        made = [run(flow_specs[family], tmp_path / x, self.few, self.protocol(family, **changes[x])) for x in changes]
        made += [
            run(flow_specs[family + x], tmp_path / x, self.few, self.protocol(family)) for x in ("-lora", "-guided")
        ]
        for images in zip(*made, strict=True):
            assert len({row.path.read_bytes() for row in images}) == len(made)

    def test_the_record(self, flow_specs, tmp_path, family):
        """The manifest names the pipeline's guidance where the protocol leaves it to the pipeline, and what was set."""
        few = PROMPTS.select(1)
        protocol = self.protocol(family, guidance_scale=None)
        run(flow_specs[family], tmp_path, few, protocol)
        manifest = json.loads((tmp_path / "images" / family / "manifest.json").read_text())
        expected = {"guidance_scale": 3.5, "true_cfg_scale": 2.0} if family == "flux" else {"guidance_scale": 7.0}
        assert manifest["protocol"] == {
            **{"num_inference_steps": 2, "scheduler": None, "height": 32, "width": 32, "seed": 0},
            **{"max_sequence_length": 16},
            **expected,
        }
        run(flow_specs[family], tmp_path, few, replace(protocol, guidance_scale=expected["guidance_scale"]))
        for tokens in (None, 12):
            with pytest.raises(ValueError, match=f"`protocol.max_sequence_length` 16, not {tokens}"):
                run(flow_specs[family], tmp_path, few, replace(protocol, max_sequence_length=tokens))

    def test_another_scheduler_is_refused(self, flow_specs, tmp_path, family):
        """A rectified flow keeps its own scheduler; the refused run leaves nothing that hinders the next one."""
        with pytest.raises(
            ValueError, match="'DDIMScheduler' does not fit a model with FlowMatchEulerDiscreteScheduler"
        ):
            run(flow_specs[family], tmp_path, self.few, self.protocol(family, scheduler="DDIMScheduler"))
        assert len(run(flow_specs[family], tmp_path, self.few, self.protocol(family))) == 3

    def test_a_negative_lora_needs_guidance(self, flow_specs, tmp_path, family):
        """Without an unconditional branch the model is refused before it is loaded, with the flag to set."""
        flag = "true_cfg_scale" if family == "flux" else "guidance_scale"
        for scale in [1.0, None] if family == "flux" else [1.0]:
            with pytest.raises(
                ValueError, match=f"unconditional branch only with a `{flag}` above 1, .*Pass `--{flag}`"
            ):
                run(flow_specs[f"{family}-guided"], tmp_path, self.few, self.protocol(family, **{flag: scale}))
        assert not any(tmp_path.rglob("*.png"))


class FromZero(StableDiffusionBackbone):
    """A family that counts guidance from 0, like Z-Image and Krea 2, and whose distilled models say that they are."""

    unguided_scale = 0.0

    @staticmethod
    def sampling_defaults(config):
        return {"guidance_scale": 0.0} if config.get("requires_safety_checker") is False else {}


def test_a_family_that_counts_guidance_from_0(specs, tmp_path, monkeypatch):
    """Its negative LoRA has an effect at a scale of 1, and none at 0, which is the default of a distilled model and in its manifest."""
    monkeypatch.setattr(sampling, "BACKBONES", (FromZero,))
    few = PROMPTS.select(1)
    assert run(specs["guided"], tmp_path / "one", few, replace(PROTOCOL, guidance_scale=1.0))
    for scale in (0.0, None):
        with pytest.raises(
            ValueError, match="unconditional branch only with a `guidance_scale` above 0, and it is 0.0"
        ):
            run(specs["guided"], tmp_path / "none", few, replace(PROTOCOL, guidance_scale=scale))
    run(specs["sd"], tmp_path / "default", few, replace(PROTOCOL, guidance_scale=None))
    manifest = json.loads((tmp_path / "default" / "images" / "sd" / "manifest.json").read_text())
    assert manifest["protocol"]["guidance_scale"] == 0.0
    run(specs["sd"], tmp_path / "asked", few, replace(PROTOCOL, guidance_scale=0.0))
    assert files(tmp_path / "default") == files(tmp_path / "asked")


def test_a_protocol_of_several_families(specs, drawn, tmp_path, caplog):
    """What a pipeline does not take is left out with a warning, and changes none of its images."""
    with caplog.at_level(logging.WARNING):
        run(specs["sd"], tmp_path, PROMPTS, replace(PROTOCOL, max_sequence_length=16, true_cfg_scale=2.0))
    assert files(tmp_path) == drawn["sd"]
    assert (
        "sd is sampled without max_sequence_length and true_cfg_scale: a `StableDiffusionPipeline` takes"
        in caplog.text
    )


class Killed(BaseException):
    """An interruption of a run."""


@pytest.fixture
def keys(monkeypatch) -> list[str]:
    """The keys of all sampled images."""
    seen, sample_images = [], module.sample_images

    def spy(*args, **settings):
        seen.extend(settings["keys"])
        return sample_images(*args, **settings)

    monkeypatch.setattr(module, "sample_images", spy)
    return seen


class TestGoingOn:
    def test_a_killed_run_ends_as_one_that_was_not(self, specs, drawn, tmp_path, keys, monkeypatch):
        """After an interruption, the same call samples only the missing images, and the files are the same."""
        replacing, written = Path.replace, []

        def kill(path, target):
            if path.name.endswith(".png.tmp"):
                written.append(target)
                if len(written) == 4:
                    raise Killed
            return replacing(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", kill)
            with pytest.raises(Killed):
                run(specs["sd"], tmp_path)
        assert len(files(tmp_path)) == 3 and len(list(tmp_path.rglob("*.tmp"))) == 1
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
        begun = list(keys)
        keys.clear()
        run(specs["sd"], tmp_path)
        assert files(tmp_path) == drawn["sd"] and not list(tmp_path.rglob("*.tmp"))
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert keys == [f"p-{n}/{i}" for n in range(5) for i in range(2)][3:] and begun[:3] == [
            "p-0/0",
            "p-0/1",
            "p-1/0",
        ]

    def test_a_finished_run_loads_nothing(self, specs, tmp_path, monkeypatch):
        """If nothing is missing, no model is loaded and no file is changed."""
        rows = run(specs["sd"], tmp_path)
        times = [row.path.stat().st_mtime_ns for row in rows]
        monkeypatch.setattr(module, "load_pipeline", None)
        assert run(specs["sd"], tmp_path) == rows
        assert [row.path.stat().st_mtime_ns for row in rows] == times

    def test_a_limited_run_grows(self, specs, drawn, tmp_path, keys):
        """More prompts of the set, and more images per prompt, are added to the existing ones."""
        run(specs["sd"], tmp_path, PROMPTS.select(2), replace(PROTOCOL, images_per_prompt=1))
        assert keys == ["p-0/0", "p-2/0"]
        run(specs["sd"], tmp_path)
        assert files(tmp_path) == drawn["sd"] and len(keys) == len(set(keys)) == 10

    def test_what_bears_on_no_image_may_change(self, specs, drawn, tmp_path):
        """The name of the protocol and the batch size may change."""
        run(specs["sd"], tmp_path, PROMPTS.select(1))
        run(specs["sd"], tmp_path, protocol=replace(PROTOCOL, name="x", unknown=("seed",), source="y"), batch_size=2)
        assert files(tmp_path).keys() == drawn["sd"].keys()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"protocol": replace(PROTOCOL, seed=1)}, "`protocol.seed` 0, not 1"),
            ({"protocol": replace(PROTOCOL, guidance_scale=4.0)}, "`protocol.guidance_scale` 3.0, not 4.0"),
            (
                {"protocol": replace(PROTOCOL, scheduler="PNDMScheduler")},
                "`protocol.scheduler` None, not 'PNDMScheduler'",
            ),
            ({"prompts": replace(PROMPTS, digest="sha256:1")}, "`prompts.digest` 'sha256:0', not 'sha256:1'"),
            ({"revision": "sha256:1"}, "`model.revision` .*, not 'sha256:1'"),
            ({"negative_lora_revision": "sha256:1"}, "`model.negative_lora_revision` None, not 'sha256:1'"),
        ],
    )
    def test_another_run_does_not_mix_in(self, specs, tmp_path, change, message):
        """Another protocol, prompt set or model is refused with the name of the difference, and nothing is sampled."""
        few = PROMPTS.select(1)
        run(specs["sd"], tmp_path, few)
        before = files(tmp_path)
        settings = {"prompts": few, "protocol": PROTOCOL} | {
            k: v for k, v in change.items() if k in ("prompts", "protocol")
        }
        spec = replace(specs["sd"], **{name: value for name, value in change.items() if name not in settings})
        with pytest.raises(ValueError, match=message) as error:
            run(spec, tmp_path, **settings)
        assert "Choose another `output_dir`, or delete that folder" in str(error.value)
        assert files(tmp_path) == before

    def test_images_from_before_there_was_a_choice(self, specs, tmp_path):
        """They have the negative LoRA on the base alone: they are kept for that form, and not taken for the other one."""
        few, folder = PROMPTS.select(1), tmp_path / "images" / "guided"
        on_base = replace(specs["guided"], negative_lora_on="base")
        run(on_base, tmp_path, few)
        before = files(tmp_path)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["model"].pop("negative_lora_on") == "base"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        sums = (folder / "SHA256SUMS").read_text().splitlines()
        (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums if "manifest" not in line))
        with pytest.raises(ValueError, match="`model.negative_lora_on` 'base', not 'aligned'"):
            run(specs["guided"], tmp_path, few)
        run(on_base, tmp_path, few)
        assert files(tmp_path) == before
        run(specs["guided"], tmp_path / "other", few)
        assert all(content != before[name] for name, content in files(tmp_path / "other").items())

    def test_a_scale_left_to_the_pipeline(self, specs, tmp_path):
        """Without a guidance scale a model has its pipeline's, and the record names it: 7.5 and None are one."""
        few = PROMPTS.select(1)
        run(specs["sd"], tmp_path, few, replace(PROTOCOL, guidance_scale=None))
        before = files(tmp_path)
        run(specs["sd"], tmp_path / "other", few, replace(PROTOCOL, guidance_scale=7.5))
        assert files(tmp_path / "other") == before
        run(specs["sd"], tmp_path, few, replace(PROTOCOL, guidance_scale=7.5))
        with pytest.raises(ValueError, match="`protocol.guidance_scale` 7.5, not 5.0"):
            run(specs["sd"], tmp_path, few, replace(PROTOCOL, guidance_scale=5.0))

    def test_other_versions_or_types_do_not_mix_in(self, specs, tmp_path, monkeypatch):
        """Other data types of the weights and other versions of diffusers and torch are refused too."""
        few = PROMPTS.select(1)
        run(specs["sd"], tmp_path, few)
        with pytest.raises(ValueError, match="`dtype` 'float32', not 'bfloat16'"):
            generate(specs["sd"], few, PROTOCOL, tmp_path, dtype="bfloat16", use_cpu=True)
        monkeypatch.setattr(module, "version", lambda package: "0.0")
        with pytest.raises(ValueError, match="`versions.diffusers` '.*', not '0.0'; `versions.torch`"):
            run(specs["sd"], tmp_path, few)

    def test_the_manifest(self, specs, tmp_path):
        """The manifest lists everything that the images depend on."""
        run(specs["guided"], tmp_path, PROMPTS.select(1))
        manifest = json.loads((tmp_path / "images" / "guided" / "manifest.json").read_text())
        assert manifest["prompts"] == {"name": "tiny", "revision": None, "digest": "sha256:0"}
        assert manifest["protocol"] == {
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "scheduler": None,
            "height": None,
            "width": None,
            "seed": 0,
        }
        assert manifest["model"]["kind"] == "lora" and manifest["model"]["revision"] == specs["lora"].revision
        assert manifest["dtype"] == "float32" and set(manifest["versions"]) == {"diffusers", "torch"}

    def test_images_of_unknown_origin(self, specs, tmp_path):
        """Images without a manifest are refused."""
        folder = tmp_path / "images" / "sd"
        folder.mkdir(parents=True)
        tiny.image(0).save(folder / "p-0_0.png")
        with pytest.raises(ValueError, match="holds images but no manifest.json"):
            run(specs["sd"], tmp_path)

    def test_two_runs_at_once(self, specs, tmp_path):
        """A second run into the folder is refused while the first is running."""
        folder = tmp_path / "images" / "sd"
        folder.mkdir(parents=True)
        with FileLock(folder / ".lock"):
            with pytest.raises(ValueError, match="Another process is sampling into .*sd. Wait"):
                run(specs["sd"], tmp_path)


class TestFoldersOfImages:
    def spec(self, folder: Path) -> ModelSpec:
        return resolve_model("others", str(folder))

    def save(self, folder: Path, *names: str) -> None:
        folder.mkdir(exist_ok=True)
        for name in names:
            tiny.image(0).save(folder / name)

    @pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp", "PNG"])
    def test_by_names(self, tmp_path, ending):
        """Images of any format are found by prompt id and index, and nothing is sampled or written."""
        self.save(tmp_path / "x", *(f"p-{n}_{i}.{ending}" for n in range(5) for i in range(2)))
        rows = run(self.spec(tmp_path / "x"), tmp_path / "out")
        assert [(row.prompt.id, row.index, row.path.name) for row in rows] == [
            (f"p-{n}", i, f"p-{n}_{i}.{ending}") for n in range(5) for i in range(2)
        ]
        assert not (tmp_path / "out").exists()

    def test_what_was_generated_is_found(self, specs, tmp_path):
        """The images of one evaluation can be a model of the next."""
        rows = run(specs["sd"], tmp_path)
        assert run(self.spec(tmp_path / "images" / "sd"), tmp_path / "out") == rows

    def test_missing_ones(self, tmp_path):
        """The error contains the number of missing images, and the first few names."""
        self.save(tmp_path / "x", "p-0_0.png", "p-2_1.png")
        with pytest.raises(ValueError, match="lacks 8 of 10 images: p-0_1, p-1_0, p-1_1, p-2_0, p-3_0 and others"):
            run(self.spec(tmp_path / "x"), tmp_path)
        with pytest.raises(ValueError, match="lacks 1 of 2 images: p-0_1\\. Each image needs the name"):
            run(self.spec(tmp_path / "x"), tmp_path, PROMPTS.select(1))

    def test_extra_ones(self, tmp_path, caplog):
        """A warning contains the number of extra images, if there are any."""
        self.save(tmp_path / "x", "p-0_0.png", "p-0_1.png")
        with caplog.at_level(logging.WARNING):
            run(self.spec(tmp_path / "x"), tmp_path, PROMPTS.select(1))
            assert not caplog.text
            self.save(tmp_path / "x", "p-0_2.png", "p-9_0.png", "grid.png")
            run(self.spec(tmp_path / "x"), tmp_path, PROMPTS.select(1))
        assert "holds 3 images that are not among the 2 of this comparison" in caplog.text

    def test_two_of_one_place(self, tmp_path):
        """Two files for the same prompt and index are refused with both names."""
        self.save(tmp_path, "p-0_0.png", "p-0_0.jpg")
        with pytest.raises(ValueError, match="p-0_0.jpg and .*p-0_0.png are both image 0 of the prompt p-0"):
            match_images(tmp_path, PROMPTS, 1)

    def write(self, folder: Path, *rows: dict) -> None:
        self.save(folder, *(row["file_name"] for row in rows if "file_name" in row))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_by_metadata(self, tmp_path, caplog):
        """Lines name the prompt by id or text; the lines of a prompt are its images in order, and others are extra."""
        self.write(
            tmp_path / "x",
            {"file_name": "b.png", "prompt": "a red circle"},
            {"file_name": "a.png", "prompt_id": "p-0"},
            {"file_name": "c.png", "prompt": "nobody asked"},
        )
        with caplog.at_level(logging.WARNING):
            rows = run(self.spec(tmp_path / "x"), tmp_path, PROMPTS.select(1))
        assert [(row.index, row.path.name) for row in rows] == [(0, "b.png"), (1, "a.png")]
        assert "holds 1 images that are not among" in caplog.text

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a cat"}, "Row 0 .* must have `file_name`"),
            ({"file_name": "a.png", "text": "a cat"}, "either `prompt_id` or `prompt`; it has file_name, text"),
            (
                {"file_name": "a.png", "prompt": "twice"},
                "a text that several prompts share: name the prompt with `prompt_id`",
            ),
        ],
    )
    def test_mistakes_in_metadata(self, tmp_path, row, message):
        """A line without an image, or without a unique prompt, is refused."""
        self.write(tmp_path, row)
        prompts = replace(PROMPTS, prompts=(Prompt("a", "twice"), Prompt("b", "twice")))
        with pytest.raises(ValueError, match=message):
            match_images(tmp_path, prompts, 1)

    def test_metadata_of_files_that_are_not_there(self, tmp_path):
        """The error names the missing file."""
        self.write(tmp_path, {"file_name": "a.png", "prompt_id": "p-0"})
        (tmp_path / "a.png").unlink()
        with pytest.raises(ValueError, match="names a.png, which does not exist"):
            match_images(tmp_path, PROMPTS, 1)


def test_a_distilled_model_is_said_to_be_one(caplog):
    """One that says how many steps it is distilled to is not sampled with others in silence; the model that it is made of is."""
    for is_distilled, steps, is_said in ((True, 50, True), (True, 8, False), (False, 50, False)):
        pipeline = FAMILIES["krea_2"].make()
        pipeline.register_to_config(is_distilled=is_distilled)
        caplog.clear()
        sample_rows(pipeline, [], Protocol(num_inference_steps=steps), 1, True, "turbo")
        assert ("turbo is distilled to 8 steps and sampled with 50" in caplog.text) is is_said
