# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A LoRA is trained on one model, and another one draws with it."""

import gc
import logging
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from peft import LoraConfig

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    EvaluationCallback,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    sample_images,
)
from trl_diffusion.backbones import FluxBackbone
from trl_diffusion.backbones.source import FreedComponent
from trl_diffusion.trainer import samples
from trl_diffusion.trainer.callbacks import SampleImagesCallback


PROMPTS = ["a red circle", "a cat and a dog"]
STEPS = 2


def sibling(pipeline: DiffusionPipeline, other: DiffusionPipeline, **components) -> DiffusionPipeline:
    """A pipeline with another denoiser and scheduler, and with the same encoders."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    components = {name: getattr(other, name), "scheduler": other.scheduler} | components
    optional = {"requires_safety_checker": False} if hasattr(pipeline, "safety_checker") else {}
    return type(pipeline)(**pipeline.components | components, **optional)


def sdxl_turbo() -> DiffusionPipeline:
    pipeline = tiny.sdxl_pipeline(seed=1)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline


# What is trained, and what draws
PAIRS = {
    "sd": (tiny.sd_pipeline, lambda: tiny.sd_pipeline(seed=1)),
    "sdxl": (tiny.sdxl_pipeline, sdxl_turbo),
    "sd3": (tiny.sd3_pipeline, lambda: tiny.sd3_pipeline(seed=1, shift=1.5)),
    "flux": (tiny.flux_pipeline, lambda: tiny.flux_pipeline(seed=1, guidance_embeds=False)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: `<family>`, `<family>-turbo` with its encoders, `<family>-other` with encoders of its own."""
    root = tmp_path_factory.mktemp("models")
    for family, (base, turbo) in PAIRS.items():
        trained, other = base(), turbo()
        trained.save_pretrained(root / family)
        sibling(trained, other).save_pretrained(root / f"{family}-turbo")
        other.save_pretrained(root / f"{family}-other")
    return root


def settings(family: str, **given) -> dict:
    return (
        tiny.FAST
        | {"num_inference_steps": STEPS, "max_steps": 2, "learning_rate": 0.2}
        | tiny.settings(PAIRS[family][0]())
        | {"use_cpu": True, "bf16": False}
        | given
    )


def make(models: Path, out, family: str = "flux", model=None, peft_config=None, **given) -> InstanceDPOTrainer:
    return InstanceDPOTrainer(
        str(models / family) if model is None else model,
        args=InstanceDPOConfig(str(out), **settings(family, **given)),
        train_dataset=tiny.pairs(4),
        peft_config=peft_config or tiny.lora(),
    )


def plain(folder: Path, family: str, lora=None, dtype=torch.float32, **given) -> np.ndarray:
    """What plain diffusers draws with a model, and with a LoRA that it loads."""
    dtypes = {"default": dtype, "vae": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtypes)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    length = {"max_sequence_length": tiny.NUM_T5_TOKENS} if family in tiny.FLOWS else {}
    size = {"height": 32, "width": 32, "num_inference_steps": STEPS}
    return pixels(sample_images(pipeline, PROMPTS, 42, **size | length | given))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in images])


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(abs(a - b).max())


class TestImages:
    @pytest.mark.parametrize("kind", ["turbo", "other"])
    @pytest.mark.parametrize("family", PAIRS)
    def test_they_are_those_of_plain_diffusers(self, models, tmp_path, family, kind):
        """With the saved LoRA loaded by diffusers into the sample model, by its scheduler and its encoders; and without it."""
        folder = models / f"{family}-{kind}"
        trainer = make(models, tmp_path / "out", family, sample_model=str(folder))
        before = pixels(trainer.sample(PROMPTS, with_reference=True))
        trainer.train()
        trainer.save_model()
        drawn, base = pixels(trainer.sample(PROMPTS)), pixels(trainer.sample(PROMPTS, with_reference=True))
        assert distance(drawn, plain(folder, family, tmp_path / "out")) <= 1
        assert distance(base, plain(folder, family)) <= 1 and np.array_equal(base, before)
        assert distance(drawn, base) > 4
        assert distance(drawn, plain(models / family, family, tmp_path / "out")) > 4
        assert trainer.samples.other.shared == (trainer.backbone.encoder_names if kind == "turbo" else ())

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("family", PAIRS)
    def test_the_model_that_is_trained(self, models, tmp_path, family, bf16):
        """Named as its own sample model, it draws what the policy draws, in mixed precision too."""
        drawn = []
        for name in (None, str(models / family)):
            trainer = make(models, tmp_path / "out", family, sample_model=name, bf16=bf16)
            trainer.train()
            drawn.append([pixels(trainer.sample(PROMPTS, with_reference=both)) for both in (False, True)])
        (policy, reference), (with_lora, without) = drawn
        assert distance(policy, with_lora) <= 1 and distance(reference, without) <= 1
        assert distance(policy, reference) > 4

    def test_a_loaded_pipeline_is_trained(self, models, tmp_path):
        """Its encoders may be others than those of its files: the sample model has its own."""
        folder = models / "flux-turbo"
        trainer = make(models, tmp_path / "out", model=tiny.flux_pipeline(), sample_model=str(folder))
        trainer.train()
        trainer.save_model()
        assert trainer.samples.other.shared == ()
        assert distance(pixels(trainer.sample(PROMPTS)), plain(folder, "flux", tmp_path / "out")) <= 1

    def test_one_encoder_of_its_own(self, models, tmp_path):
        """Encoders are borrowed one by one; a VAE with another scale is another VAE."""
        pipeline = DiffusionPipeline.from_pretrained(models / "flux-turbo")
        pipeline.text_encoder_2 = tiny.flux_pipeline(seed=5).text_encoder_2
        pipeline.vae.register_to_config(scaling_factor=1.0)
        pipeline.save_pretrained(tmp_path / "mixed")
        trainer = make(models, tmp_path / "out", sample_model=str(tmp_path / "mixed"))
        trainer.save_model()
        assert trainer.samples.other.shared == ("text_encoder",)
        assert distance(pixels(trainer.sample(PROMPTS)), plain(tmp_path / "mixed", "flux")) <= 1

    def test_another_vae_is_not_that_of_the_files(self, models, tmp_path):
        """A VAE that `model_init_kwargs` names is the trained pipeline's alone."""
        given = {"model_init_kwargs": {"vae": str(models / "flux-other")}, "sample_model": str(models / "flux-turbo")}
        trainer = make(models, tmp_path / "out", **given)
        assert trainer.samples.other.shared == ("text_encoder", "text_encoder_2")
        assert (
            distance(pixels(trainer.sample(PROMPTS, with_reference=True)), plain(models / "flux-turbo", "flux")) <= 1
        )

    def test_the_pipeline(self, models, tmp_path):
        """`trainer.pipeline()` is that of the sample model, with the LoRA as it is when it is asked for."""
        folder = models / "flux-turbo"
        trainer = make(models, tmp_path / "out", sample_model=str(folder), precompute=True)
        trainer.train()
        trainer.save_model()
        pipeline = trainer.pipeline()
        trainer.sample(PROMPTS)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": 16}
        drawn = pixels(sample_images(pipeline, PROMPTS, 42, **size))
        assert distance(drawn, plain(folder, "flux", tmp_path / "out")) <= 1
        pipeline.unload_lora_weights()
        assert distance(pixels(sample_images(pipeline, PROMPTS, 42, **size)), plain(folder, "flux")) <= 1

    @pytest.mark.parametrize("in_reference", [True, False])
    def test_the_base_of_a_lora_that_goes_on(self, models, tmp_path, in_reference):
        """The sample model without the training has the LoRA that it started at, where the reference has it."""
        folder = models / "flux-turbo"
        first = make(models, tmp_path / "first", sample_model=str(folder))
        first.train()
        first.save_model()
        given = {"initial_lora": str(tmp_path / "first"), "initial_lora_in_reference": in_reference}
        trainer = make(models, tmp_path / "out", sample_model=str(folder), sample_prompts=PROMPTS, **given)
        trainer.train()
        expected = plain(folder, "flux", tmp_path / "first" if in_reference else None)
        assert distance(pixels(trainer.sample(PROMPTS, with_reference=True)), expected) <= 1
        assert distance(plain(folder, "flux", tmp_path / "first"), plain(folder, "flux")) > 4


class TestTraining:
    @pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
    @pytest.mark.parametrize("family", ["sdxl", "flux"])
    def test_samples_change_no_number(self, models, tmp_path, family, precompute):
        """Losses and weights are those of a training without samples, bit for bit, with dropout from torch's generator too."""
        found = []
        for name in ("without", "turbo", "other"):
            given = {} if name == "without" else {"sample_model": str(models / f"{family}-{name}")}
            given |= {"sample_prompts": PROMPTS, "sample_steps": 1} if given else {}
            peft_config = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.3)
            given |= {"precompute": precompute, "precompute_dir": str(tmp_path / "files"), "max_steps": 3}
            trainer = make(models, tmp_path / name, family, peft_config=peft_config, **given)
            trainer.train()
            placed = [(key, value.device.type) for key, value in trainer.model.named_parameters()]
            found.append((tiny.losses(trainer), tiny.weights(trainer.model), placed, torch.get_rng_state()))
            assert len(list((tmp_path / name).glob("samples/*.png"))) == (0 if name == "without" else 4)
        (losses, weights, placed, random), *others = found
        assert len(losses) == 3 and losses[0] != losses[1]
        for other_losses, other_weights, other_placed, other_random in others:
            assert losses == other_losses and placed == other_placed
            assert tiny.max_difference(weights, other_weights) == 0
            assert torch.equal(random, other_random)

    def test_the_picture(self, models, tmp_path, monkeypatch):
        """Its columns are the sample model, by its name, and the step: without the LoRA and with it."""
        grids = []
        monkeypatch.setattr(
            "trl_diffusion.trainer.callbacks.image_grid",
            lambda images, **labels: grids.append((images, labels["column_labels"])) or images[0][0],
        )
        folder = models / "flux-turbo"
        trainer = make(models, tmp_path / "out", sample_model=str(folder), sample_prompts=PROMPTS)
        assert any(isinstance(callback, SampleImagesCallback) for callback in trainer.callback_handler.callbacks)
        trainer.train()
        trainer.save_model()
        assert [labels for _, labels in grids] == [["flux-turbo", "step 0"], ["flux-turbo", "step 2"]]
        base, drawn = (pixels(column) for column in zip(*grids[-1][0], strict=True))
        assert distance(base, plain(folder, "flux")) <= 1
        assert distance(drawn, plain(folder, "flux", tmp_path / "out")) <= 1

    def test_it_is_loaded_to_draw_and_freed_after(self, models, tmp_path, monkeypatch):
        """Nothing is loaded before the first images; after each drawing the denoiser is gone and the encoders are as they were."""
        loaded, own_load = [], samples.SampleModel.load

        def load(self, policy, adapter):
            pipeline = own_load(self, policy, adapter)
            loaded.append((pipeline, weakref.ref(pipeline.transformer), pipeline.text_encoder_2))
            return pipeline

        monkeypatch.setattr(samples.SampleModel, "load", load)
        trainer = make(models, tmp_path / "out", sample_model=str(models / "flux-turbo"), precompute=True)
        trainer.train()
        assert loaded == []
        trainer.sample(PROMPTS)
        trainer.sample(PROMPTS, with_reference=True)
        gc.collect()
        assert len(loaded) == 2 and all(denoiser() is None for _, denoiser, _ in loaded)
        for pipeline, _, _ in loaded:
            assert isinstance(pipeline.transformer, FreedComponent) and isinstance(pipeline.vae, FreedComponent)
        assert isinstance(trainer.backbone.pipeline.text_encoder_2, FreedComponent)

    def test_encoders_are_borrowed(self, models, tmp_path):
        """Of a live training, the sample model has the very text encoders and the VAE of the trained pipeline."""
        trainer = make(models, tmp_path / "out", sample_model=str(models / "flux-turbo"))
        with trainer.samples.other.lend(trainer.policy, None) as pipeline:
            for name in trainer.backbone.encoder_names:
                assert getattr(pipeline, name) is getattr(trainer.backbone.pipeline, name)
            assert pipeline.transformer is not trainer.backbone.denoiser
        assert isinstance(trainer.backbone.pipeline.vae, torch.nn.Module)

    def test_after_an_error_everything_is_as_it_was(self, models, tmp_path):
        """What fails while it draws leaves the policy and the encoders in their places."""
        trainer = make(models, tmp_path / "out", sample_model=str(models / "flux-turbo"))
        before = tiny.weights(trainer.policy)
        with pytest.raises(KeyError), trainer.samples.other.lend(trainer.policy, "default"):
            raise KeyError("stop")
        assert tiny.max_difference(before, tiny.weights(trainer.policy)) == 0
        trainer.train()
        assert len(tiny.losses(trainer)) == 2

    def test_both_stages_of_complex_po(self, models, tmp_path):
        """Stage 1 has no reference, and stage 2 has a second adapter: the one that is trained is put on the sample model."""
        (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
        given = settings("flux", criteria=str(tmp_path / "tree.yaml"), sample_model=str(models / "flux-turbo"))
        shared = {"train_dataset": tiny.paintings(4), "peft_config": tiny.lora()}
        expert = AttributeSFTTrainer(
            str(models / "flux"), args=AttributeSFTConfig(str(tmp_path / "expert"), **given), **shared
        )
        trainers = [expert]
        expert.train()
        expert.save_model()
        trainers.append(
            ComplexPOTrainer(
                str(models / "flux"),
                str(tmp_path / "expert"),
                args=ComplexPOConfig(str(tmp_path / "cpo"), **given),
                **shared,
            )
        )
        trainers[1].train()
        trainers[1].save_model()
        for trainer, name in zip(trainers, ("expert", "cpo"), strict=True):
            expected = plain(models / "flux-turbo", "flux", tmp_path / name)
            assert distance(pixels(trainer.sample(PROMPTS)), expected) <= 1
            base = pixels(trainer.sample(PROMPTS, with_reference=True))
            assert distance(base, plain(models / "flux-turbo", "flux")) <= 1

    def test_scores_are_those_of_its_images(self, models, tmp_path):
        """An `EvaluationCallback` scores what the sample model draws."""

        class Seen:
            name, higher_is_better = "seen", True

            def score(self, images, prompts, batch_size):
                from trl_diffusion.metrics.scorer import Scores

                seen.append(pixels(images))
                return Scores([1.0] * len(images), {})

        seen: list[np.ndarray] = []
        trainer = make(models, tmp_path / "out", sample_model=str(models / "flux-turbo"))
        trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Seen()], steps=5))
        trainer.train()
        trainer.save_model()
        assert distance(seen[0], plain(models / "flux-turbo", "flux")) <= 1
        assert distance(seen[-1], plain(models / "flux-turbo", "flux", tmp_path / "out")) <= 1


class TestSettings:
    def arguments(self, trainer, monkeypatch) -> dict:
        """The arguments that the pipeline is called with."""
        called, own = {}, samples.sample_images
        monkeypatch.setattr(
            samples, "sample_images", lambda *args, **kwargs: called.update(kwargs) or own(*args, **kwargs)
        )
        trainer.sample(PROMPTS)
        return called

    def test_those_of_its_pipeline(self, models, tmp_path, monkeypatch, caplog):
        """Steps and guidance that nobody asked for are those of the pipeline's call, which is said; else 25 steps."""
        with caplog.at_level(logging.WARNING):
            trainer = make(models, tmp_path, sample_model=str(models / "flux-turbo"), num_inference_steps=None)
        assert (
            "draws samples with `num_inference_steps=28` and `guidance_scale=3.5`, as every `FluxPipeline`"
            in caplog.text
        )
        assert self.arguments(trainer, monkeypatch)["num_inference_steps"] == 28
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make(models, tmp_path, sample_model=str(models / "flux-turbo"), guidance_scale=0.0)
        assert "draws samples" not in caplog.text
        called = self.arguments(trainer, monkeypatch)
        assert (called["num_inference_steps"], called["guidance_scale"]) == (STEPS, 0.0)
        assert make(models, tmp_path, num_inference_steps=None).args.num_inference_steps == 25

    def test_a_distilled_model_that_says_so(self, models, tmp_path, monkeypatch, caplog):
        """What its family knows of it holds where nothing else is asked for, and nothing need be said."""
        defaults = {"num_inference_steps": 3, "guidance_scale": 0.0}
        monkeypatch.setattr(FluxBackbone, "sampling_defaults", staticmethod(lambda config: defaults))
        with caplog.at_level(logging.WARNING):
            trainer = make(models, tmp_path, sample_model=str(models / "flux-turbo"), num_inference_steps=None)
        assert "draws samples" not in caplog.text
        calls = []
        monkeypatch.setattr(
            "diffusers.FluxPipeline.check_inputs", lambda self, *args, **kwargs: calls.append(self.transformer.config)
        )
        assert self.arguments(trainer, monkeypatch)["num_inference_steps"] == 3
        assert calls and not calls[0].guidance_embeds


def without_weights(folder: Path, copy: Path) -> Path:
    """The same pipeline without the weights of its denoiser."""
    shutil.copytree(folder, copy)
    for file in copy.glob("transformer/*.safetensors"):
        file.unlink()
    return copy


class TestRefused:
    def refused(self, models, tmp_path, match, family="flux", **given):
        with pytest.raises(ValueError, match=match):
            make(models, tmp_path / "out", family, **given)

    @pytest.mark.parametrize("precompute", [False, True])
    def test_all_weights(self, models, tmp_path, precompute):
        """Only a LoRA can be carried over; nothing is trained or precomputed before it is said."""
        given = settings("flux", sample_model=str(models / "flux-turbo"), precompute=precompute)
        given |= {"precompute_dir": str(tmp_path / "files")}
        with pytest.raises(ValueError, match="all weights are trained: only a LoRA .* or leave out `sample_model`"):
            InstanceDPOTrainer(
                str(models / "flux"), args=InstanceDPOConfig(str(tmp_path), **given), train_dataset=tiny.pairs(4)
            )
        assert not (tmp_path / "files").exists()

    def test_another_family(self, models, tmp_path):
        """It is named, with what is trained."""
        match = "it is a `StableDiffusion3Pipeline`, and a `FluxPipeline` is trained. Name a model of the same architecture"
        self.refused(models, tmp_path, match, sample_model=str(models / "sd3-turbo"))

    @pytest.mark.parametrize(
        ("change", "target_modules", "match"),
        [
            (
                {"num_attention_heads": 4},
                None,
                r"the weight of `\S+` has the shape \(32, 32\), and \(16, 16\) is trained",
            ),
            (
                {"joint_attention_dim": 48},
                ["context_embedder"],
                r"has the shape \(16, 48\), and \(16, 32\) is trained",
            ),
            (
                {"num_layers": 2},
                None,
                "would also adapt 8 of the modules that the LoRA adapts, such as `transformer_blocks.1",
            ),
            (
                {"num_single_layers": 0},
                None,
                "is without 3 of the modules that the LoRA adapts, such as `single_transformer",
            ),
            (
                {"guidance_embeds": False},
                "all-linear",
                "is without 2 of the modules .* such as `time_text_embed.guidance_embedder",
            ),
        ],
    )
    def test_other_shapes(self, models, tmp_path, change, target_modules, match):
        """The module is named before any weights are loaded: the sample model has none here."""
        folder = without_weights(models / "flux-turbo", tmp_path / "other")
        config = dict(tiny.flux_pipeline().transformer.config) | change
        type(tiny.flux_pipeline().transformer).from_config(config).save_config(folder / "transformer")
        lora = LoraConfig(r=4, lora_alpha=4, target_modules=target_modules)
        self.refused(models, tmp_path, match, sample_model=str(folder), peft_config=lora)
        self.refused(models, tmp_path, match, sample_model=str(folder), peft_config=lora, precompute=True)

    def test_what_is_no_pipeline(self, models, tmp_path):
        """A folder that is not there, a LoRA, a component, a single file, a loaded pipeline."""
        trainer = make(models, tmp_path / "lora")
        trainer.save_model()
        (tmp_path / "model.safetensors").write_bytes(b"")
        for name, match in (
            (str(tmp_path / "none"), "There is no folder or file"),
            ("user/no-such-model", "`sample_model` user/no-such-model cannot be read: "),
            (str(tmp_path / "lora"), "holds a LoRA .* and no pipeline"),
            (str(models / "flux-turbo" / "transformer"), "holds one component, a `FluxTransformer2DModel`"),
            (str(tmp_path / "model.safetensors"), "is a single file. Save it as a pipeline's folder"),
            (tiny.flux_pipeline(), "`sample_model` is a `FluxPipeline`: pass the name of a pipeline"),
        ):
            self.refused(models, tmp_path, match, sample_model=name)
