# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A training that starts at an earlier LoRA."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.backbones import load_backbone
from trl_diffusion.lora_files import LORA_WEIGHTS_NAME


LOG2 = 0.6931471805599453


def make_trainer(folder: Path, family: str = "sd", peft_config: LoraConfig | None = None, **settings):
    pipeline = tiny.PIPELINES[family]()
    args = InstanceDPOConfig(str(folder), **tiny.FAST | tiny.settings(pipeline) | settings)
    return InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=peft_config)


def adapter(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in get_peft_model_state_dict(trainer.policy).items()}


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict[str, Path]:
    """A trained LoRA of each family, with another rank for some layers and alpha unlike the rank."""
    root = tmp_path_factory.mktemp("loras")
    for family in ("sd", "sdxl", *tiny.FLOWS):
        config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"to_k": 2}, lora_dropout=0.0)
        trainer = make_trainer(root / family, family, config, learning_rate=0.1)
        trainer.train()
        trainer.save_model()
    return {family: root / family for family in ("sd", "sdxl", *tiny.FLOWS)}


def plain_prediction(
    pipeline: DiffusionPipeline, lora: Path | None, trainer: InstanceDPOTrainer | None = None
) -> torch.Tensor:
    """What diffusers itself predicts with the LoRA, for the prompts as a trainer encodes them."""
    backbone = trainer.backbone if trainer else load_backbone(tiny.sd_pipeline())
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return tiny.predictions(backbone, getattr(pipeline, backbone.denoiser_name))


@pytest.mark.parametrize("family", ["sd", "sdxl", *tiny.FLOWS])
def test_policy_and_reference_start_at_the_lora(tmp_path, loras, family):
    """Both predict what diffusers does with the LoRA; after training the reference still does, and the file has the policy."""
    trainer = make_trainer(tmp_path, family, initial_lora=str(loras[family]))
    assert (trainer.policy.peft_config["default"].r, trainer.policy.peft_config["default"].lora_alpha) == (4, 6)
    expected = plain_prediction(tiny.PIPELINES[family](), loras[family], trainer)
    base = plain_prediction(tiny.PIPELINES[family](), None, trainer)
    assert (expected - base).abs().max() > 1e-3

    def predictions() -> tuple[torch.Tensor, torch.Tensor]:
        own = tiny.predictions(trainer.backbone, trainer.policy)
        with trainer.reference.lend(trainer.policy) as reference:
            return own, tiny.predictions(trainer.backbone, reference)

    assert all(torch.equal(prediction, expected) for prediction in predictions())
    trainer.train()
    assert abs(tiny.losses(trainer)[0] - LOG2) < 1e-6
    policy, reference = predictions()
    assert torch.equal(reference, expected) and not torch.equal(policy, expected)
    trainer.save_model()
    assert not any("reference" in key for key in load_file(tmp_path / LORA_WEIGHTS_NAME))
    assert torch.equal(plain_prediction(tiny.PIPELINES[family](), tmp_path, trainer), policy)


def test_only_the_policys_lora_is_trained(tmp_path, loras):
    """The copy is frozen, before and after lending."""
    trainer = make_trainer(tmp_path, initial_lora=str(loras["sd"]))
    with trainer.reference.lend(trainer.policy):
        pass
    trained = {name for name, weight in trainer.policy.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name for name in trained)
    assert len(trained) == len(get_peft_model_state_dict(trainer.policy))


def test_the_base_as_reference(tmp_path, loras):
    """Without the LoRA in the reference, it is the plain base, and the first loss is not ln 2."""
    trainer = make_trainer(tmp_path, initial_lora=str(loras["sd"]), initial_lora_in_reference=False)
    with trainer.reference.lend(trainer.policy) as reference:
        prediction = tiny.predictions(trainer.backbone, reference)
    assert torch.equal(prediction, plain_prediction(tiny.sd_pipeline(), None))
    trainer.train()
    assert abs(tiny.losses(trainer)[0] - LOG2) > 1e-3


def test_another_reference(tmp_path, loras):
    """A `ref_model` is the reference, with or without the LoRA in the policy."""
    args = InstanceDPOConfig(str(tmp_path), **tiny.FAST, initial_lora=str(loras["sd"]))
    trainer = InstanceDPOTrainer(tiny.sd_pipeline(), tiny.other_unet(), args, train_dataset=tiny.pairs(4))
    with trainer.reference.lend(trainer.policy) as reference:
        prediction = tiny.predictions(trainer.backbone, reference)
    assert torch.equal(prediction, plain_prediction(tiny.other_unet(), None))
    assert "reference" not in trainer.policy.peft_config


@pytest.mark.parametrize("in_reference", [True, False])
def test_resuming_is_exact(tmp_path, loras, in_reference):
    """Stopped after two of four steps and resumed, a run ends on the weights of one that was not stopped."""
    settings = {
        "initial_lora": str(loras["sd"]),
        "initial_lora_in_reference": in_reference,
        "lr_scheduler_type": "constant",
    }
    whole = make_trainer(tmp_path / "a", max_steps=4, **settings)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "b", **settings | saving | {"max_steps": 2}).train()
    resumed = make_trainer(tmp_path / "b", **settings | saving | {"max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert tiny.max_difference(adapter(whole), adapter(resumed)) == 0


def test_resuming_with_another_lora_is_said(tmp_path, loras, caplog):
    """By content: the same LoRA at another place is the same."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path / "out", initial_lora=str(loras["sd"]), **settings).train()
    moved, other = tmp_path / "moved", tmp_path / "other"
    for folder in (moved, other):
        folder.mkdir()
        weights = load_file(loras["sd"] / LORA_WEIGHTS_NAME)
        if folder is other:
            weights = {name: 2 * weight for name, weight in weights.items()}
        save_file(weights, folder / LORA_WEIGHTS_NAME, header_of(loras["sd"]))
    for folder, said in ((moved, False), (other, True)):
        caplog.clear()
        trainer = make_trainer(tmp_path / "out", initial_lora=str(folder), **settings | {"max_steps": 3})
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert ("started at (`initial_lora`) is another one" in caplog.text) == said


def header_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / LORA_WEIGHTS_NAME, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("noise_source", ["random", "inversion"])
def test_precomputed_predictions_are_of_the_lora(tmp_path, loras, noise_source):
    """They are those of a step that computes them, and not those that were kept for another LoRA or for the base."""
    settings = {"precompute_dir": str(tmp_path / "cache"), "noise_source": noise_source, "inversion_steps": 2}
    settings |= {"precompute": True, "precompute_ref_preds": True, "max_steps": 2}
    make_trainer(tmp_path / "base", peft_config=tiny.lora(), **settings)
    kept = make_trainer(tmp_path / "a", initial_lora=str(loras["sd"]), **settings)
    kept.train()
    assert abs(tiny.losses(kept)[0] - LOG2) < 1e-6
    base = make_trainer(tmp_path / "b", initial_lora=str(loras["sd"]), initial_lora_in_reference=False, **settings)
    base.train()
    assert abs(tiny.losses(base)[0] - LOG2) > 1e-3


@pytest.mark.parametrize(
    "settings", [{"bf16": True, "use_cpu": True}, {"activation_checkpointing": True}], ids=["bf16", "checkpointing"]
)
def test_other_ways_to_compute(tmp_path, loras, settings):
    """The first loss is ln 2, and the training moves the weights."""
    trainer = make_trainer(tmp_path, initial_lora=str(loras["sd"]), **settings)
    before = adapter(trainer)
    trainer.train()
    assert abs(tiny.losses(trainer)[0] - LOG2) < 1e-6
    assert tiny.max_difference(before, adapter(trainer)) > 1e-4


def test_gradient_checkpointing_changes_nothing(tmp_path, loras):
    """The recomputed forward uses the policy's adapter: the same weights with and without."""
    ends = []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), initial_lora=str(loras["sd"]), activation_checkpointing=on)
        trainer.train()
        ends.append(adapter(trainer))
    assert tiny.max_difference(*ends) == 0


class TestPeftConfig:
    def test_the_same_settings_otherwise_written(self, tmp_path, loras):
        """What counts is rank, scale and modules; the dropout is the user's."""
        targets = ["attn1.to_q", "attn2.to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={"attn1.to_k": 2, "attn2.to_k": 2},
            target_modules=targets,
            lora_dropout=0.5,
        )
        trainer = make_trainer(tmp_path, peft_config=config, initial_lora=str(loras["sd"]))
        assert trainer.policy.peft_config["default"].lora_dropout == 0.5
        assert (
            tiny.max_difference(adapter(trainer), adapter(make_trainer(tmp_path, initial_lora=str(loras["sd"])))) == 0
        )

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"r": 8}, r"the rank of .* is 4 in the LoRA and 8 in `peft_config`"),
            ({"lora_alpha": 4}, r"the scale .* is 1.5 in the LoRA and 1 in `peft_config`"),
            ({"use_rslora": True}, r"the scale .* is 1.5 in the LoRA and 3 in `peft_config`"),
            (
                {"target_modules": ["to_q", "to_k"]},
                "the LoRA adapts 16 modules that `peft_config` does not, such as '.*to_v",
            ),
            ({"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]}, "the LoRA does not adapt 4 modules"),
            ({"use_dora": True}, "`use_dora` is False in the LoRA and True in `peft_config`"),
        ],
        ids=["r", "alpha", "rslora", "fewer", "more", "dora"],
    )
    def test_other_settings(self, tmp_path, loras, config, message):
        """The message names what differs."""
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}} | config)
        with pytest.raises(ValueError, match=message) as error:
            make_trainer(tmp_path, peft_config=config, initial_lora=str(loras["sd"]))
        assert "Leave `peft_config` out" in str(error.value)


class TestFiles:
    def test_a_file(self, tmp_path, loras):
        """The file itself is the LoRA of its folder."""
        trainers = [
            make_trainer(tmp_path, initial_lora=str(path)) for path in (loras["sd"], loras["sd"] / LORA_WEIGHTS_NAME)
        ]
        assert tiny.max_difference(*map(adapter, trainers)) == 0

    @pytest.mark.parametrize("family", ["sd", "sdxl"])
    def test_names_of_kohya(self, tmp_path, loras, family):
        """With `.alpha` tensors: the policy predicts what diffusers does with that file."""
        save_file(kohya(loras[family]), tmp_path / "theirs.safetensors")
        trainer = make_trainer(tmp_path, family, initial_lora=str(tmp_path / "theirs.safetensors"))
        expected = plain_prediction(tiny.PIPELINES[family](), loras[family], trainer)
        assert torch.equal(tiny.predictions(trainer.backbone, trainer.policy), expected)
        trainer.train()
        trainer.save_model()
        policy = tiny.predictions(trainer.backbone, trainer.policy)
        assert torch.equal(plain_prediction(tiny.PIPELINES[family](), tmp_path, trainer), policy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: [w.pop(key) for key in list(w) if key.endswith(".alpha")], "names of another library"),
            (lambda w: w.pop(next(key for key in w if key.endswith(".alpha"))), "whose strength is unknown"),
            (lambda w: w.pop(next(key for key in w if "lora_up" in key)), "does not convert"),
            (lambda w: w[next(key for key in w if "lora_up" in key)].fill_(float("nan")), "not finite"),
            (
                lambda w: w.update(text_encoder_part()),
                "adapts more than a denoiser: text_encoder, unet.*their part would be lost",
            ),
        ],
        ids=["no alpha", "some alphas", "a half", "nan", "text encoder"],
    )
    def test_files_that_are_refused(self, tmp_path, loras, change, message):
        """With the reason."""
        weights = kohya(loras["sd"])
        change(weights)
        save_file(weights, tmp_path / "theirs.safetensors")
        with pytest.raises(ValueError, match=f"`initial_lora` cannot be read: .*{message}"):
            make_trainer(tmp_path, initial_lora=str(tmp_path / "theirs.safetensors"))

    def test_another_model(self, tmp_path, loras):
        """It is refused before anything is precomputed."""
        for family, other in (("sd", "sdxl"), ("sdxl", "sd"), ("sd3", "flux"), ("flux", "sd3"), ("sd", "sd3")):
            settings = {"precompute": True, "precompute_dir": str(tmp_path / "cache")}
            with pytest.raises(ValueError, match="`initial_lora`"):
                make_trainer(tmp_path, other, initial_lora=str(loras[family]), **settings)
        assert not (tmp_path / "cache").exists()


def kohya(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA of a fixture as kohya's scripts write it."""
    weights = {}
    for key, weight in load_file(folder / LORA_WEIGHTS_NAME).items():
        module, half, _ = key.removeprefix("unet.").rsplit(".", 2)
        name = f"lora_unet_{module.replace('.', '_')}"
        weights[f"{name}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = weight
        weights[f"{name}.alpha"] = torch.tensor(6.0)
    return weights


def text_encoder_part() -> dict[str, torch.Tensor]:
    names = [f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj" for part in ("q", "k", "v", "out")]
    return {
        key: value
        for name in names
        for key, value in (
            (f"{name}.lora_down.weight", torch.ones(2, 16)),
            (f"{name}.lora_up.weight", torch.ones(16, 2)),
            (f"{name}.alpha", torch.tensor(2.0)),
        )
    }


class TestCPO:
    @pytest.fixture
    def criteria(self, tmp_path) -> str:
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny.CRITERIA)
        return str(path)

    def test_the_expert_goes_on(self, tmp_path, loras, criteria):
        """The first stage starts at a LoRA, without a `peft_config`; what is drawn as the base is the model before training."""
        args = AttributeSFTConfig(
            str(tmp_path),
            criteria=criteria,
            **tiny.FAST,
            initial_lora=str(loras["sd"]),
            sample_prompts=["a cat"],
            num_inference_steps=1,
        )
        trainer = AttributeSFTTrainer(tiny.sd_pipeline(), args, train_dataset=tiny.paintings(4))
        expected = plain_prediction(tiny.sd_pipeline(), loras["sd"])
        assert torch.equal(tiny.predictions(trainer.backbone, trainer.policy), expected)
        trainer.train()
        with trainer.reference.lend(trainer.policy) as reference:
            assert torch.equal(tiny.predictions(trainer.backbone, reference), expected)

    @pytest.mark.parametrize("in_reference", [True, False])
    def test_policy_and_expert(self, tmp_path, loras, criteria, in_reference):
        """The policy starts at the LoRA and the expert stays; the reference of a batch of three adapters is the LoRA, or the base."""
        settings = {"criteria": criteria, **tiny.FAST}
        expert = AttributeSFTTrainer(
            tiny.sd_pipeline(),
            AttributeSFTConfig(str(tmp_path / "expert"), **settings | {"learning_rate": 0.1}),
            train_dataset=tiny.paintings(4),
            peft_config=tiny.lora(2, 2),
        )
        expert.train()
        args = ComplexPOConfig(
            str(tmp_path / "out"), **settings, initial_lora=str(loras["sd"]), initial_lora_in_reference=in_reference
        )
        trainer = ComplexPOTrainer(tiny.sd_pipeline(), expert, args, train_dataset=tiny.paintings(4))
        lora = plain_prediction(tiny.sd_pipeline(), loras["sd"])
        assert torch.equal(tiny.predictions(trainer.backbone, trainer.policy), lora)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        noised = next(trainer.noised_batches(trainer.model, inputs))
        with torch.no_grad():
            with trainer.reference.lend(trainer.policy) as reference:
                expected = trainer._predict(reference.eval(), noised)
            assert (noised.frozen["ref_pred"] - expected).abs().max() < 1e-5
            own = trainer._predict(trainer.policy, noised)
        assert ((own - expected).abs().max() < 1e-6) == in_reference
        before = [weight.clone() for name, weight in trainer.policy.named_parameters() if ".default." not in name]
        trainer.train()
        after = [weight for name, weight in trainer.policy.named_parameters() if ".default." not in name]
        assert all(map(torch.equal, before, after))
