# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Scores during training are those of the policy's samples, and do not change the training."""

import numpy as np
import pytest
import torch

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    EvaluationCallback,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    sample_images,
)
from trl_diffusion.metrics.scorer import Scorer, ScoringError


PROMPTS = ["a red circle", "a cat and a dog", "a blue square"]


class Brightness(Scorer):
    """Mean value of the pixels of an image."""

    name = "brightness"

    def prepare(self, image):
        return np.asarray(image, dtype=np.float64).mean()

    def score_batch(self, prepared, prompts):
        return list(prepared)


class Silent(Brightness):
    """A judge that never answers."""

    name = "silent"

    def score_batch(self, prepared, prompts):
        return [ScoringError("no answer")] * len(prepared)


class Darkness(Brightness):
    name = "darkness"
    higher_is_better = False


def make_trainer(output_dir, peft_config=None, **settings):
    args = InstanceDPOConfig(str(output_dir), num_inference_steps=2, **tiny.FAST | settings)
    return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(), peft_config=peft_config)


@pytest.mark.parametrize("peft_config", [None, tiny.lora()], ids=["full", "lora"])
def test_what_is_logged_are_the_scores_of_what_is_drawn(tmp_path, peft_config):
    """Before training, every `steps` steps and at the end: means over the prompts, and wins against the base."""
    trainer = make_trainer(tmp_path, peft_config, learning_rate=0.05)
    settings = {"seed": trainer.args.seed, "num_inference_steps": 2, "guidance_scale": trainer.args.guidance_scale}
    base = [np.asarray(image).mean() for image in sample_images(tiny.sd_pipeline(), PROMPTS, **settings)]
    trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Brightness(), Darkness()], steps=2))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_brightness" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 3]
    assert entries[0]["eval_brightness"] == pytest.approx(np.mean(base))
    assert entries[0]["eval_brightness_win_rate"] == 0.5  # the base against itself: ties
    trained = [np.asarray(image).mean() for image in trainer.sample(PROMPTS)]
    assert entries[-1]["eval_brightness"] == pytest.approx(np.mean(trained))
    wins = np.mean([(1 + np.sign(own - other)) / 2 for own, other in zip(trained, base, strict=True)])
    assert entries[-1]["eval_brightness_win_rate"] == pytest.approx(wins)
    assert entries[-1]["eval_darkness_win_rate"] == pytest.approx(1 - wins)
    assert wins != 0.5


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_samples_of_flow_models(tmp_path, family):
    """Samples and scores in training are of the tokens that are trained with, base and policy alike."""
    pipeline = tiny.sd3_pipeline() if family == "sd3" else tiny.flux_pipeline()
    settings = {"resolution": 32, "max_sequence_length": 16, "sample_prompts": PROMPTS, "num_inference_steps": 2}
    args = InstanceDPOConfig(str(tmp_path), **tiny.FAST | settings | {"max_steps": 1, "learning_rate": 0.05})
    trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora())
    encode_prompt, lengths = pipeline.encode_prompt, set()

    def spy(*args, **kwargs):
        lengths.add(kwargs["max_sequence_length"])
        return encode_prompt(*args, **kwargs)

    pipeline.encode_prompt = spy
    trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Brightness()], steps=1))
    trainer.train()
    assert lengths == {16}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000000.png", "step-000001.png"}
    entries = [entry for entry in trainer.state.log_history if "eval_brightness" in entry]
    new = tiny.sd3_pipeline() if family == "sd3" else tiny.flux_pipeline()
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
    base = [np.asarray(image).mean() for image in sample_images(new, PROMPTS, seed=args.seed, **settings)]
    assert entries[0]["eval_brightness"] == pytest.approx(np.mean(base))
    trained = [np.asarray(image).mean() for image in trainer.sample(PROMPTS)]
    assert entries[-1]["eval_brightness"] == pytest.approx(np.mean(trained)) != np.mean(base)


@pytest.mark.parametrize("peft_config", [None, tiny.lora()], ids=["full", "lora"])
def test_a_method_without_a_reference_is_compared_to_the_model_before(tmp_path, peft_config):
    """Fine-tuning has no reference; its base is the model before training, at every evaluation."""
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    args = AttributeSFTConfig(
        str(tmp_path),
        criteria=str(tmp_path / "tree.yaml"),
        num_inference_steps=2,
        **tiny.FAST | {"learning_rate": 0.05},
    )
    trainer = AttributeSFTTrainer(
        tiny.sd_pipeline(), args=args, train_dataset=tiny.paintings(), peft_config=peft_config
    )
    base = [np.asarray(image).mean() for image in trainer.sample(PROMPTS)]
    trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Brightness()], steps=10))
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if "eval_brightness" in entry)
    assert first["eval_brightness"] == pytest.approx(np.mean(base))
    trained = [np.asarray(image).mean() for image in trainer.sample(PROMPTS)]
    wins = np.mean([(1 + np.sign(own - other)) / 2 for own, other in zip(trained, base, strict=True)])
    assert first["eval_brightness_win_rate"] == 0.5 and last["eval_brightness_win_rate"] == pytest.approx(wins)
    assert trained != base


def test_training_is_as_without(tmp_path):
    """Losses, weights and records are those of a training without the callback."""
    trainers = [make_trainer(tmp_path) for _ in range(2)]
    trainers[1].add_callback(EvaluationCallback(trainers[1], PROMPTS, [Brightness()], steps=1))
    for trainer in trainers:
        trainer.train()
    logs = [
        [
            {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
            for entry in trainer.state.log_history
        ]
        for trainer in trainers
    ]
    assert [entry for entry in logs[1] if "eval_brightness" not in entry] == logs[0]
    assert not any("rewards/margins" in entry for entry in logs[1] if "eval_brightness" in entry)
    assert tiny.max_difference(*(tiny.weights(trainer.model) for trainer in trainers)) == 0


def test_a_judge_without_answers_does_not_stop_a_training(tmp_path, caplog):
    """A score without any values is left out of the log, with a warning."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Silent(), Brightness()], steps=10))
    trainer.train()
    assert not any("eval_silent" in entry for entry in trainer.state.log_history)
    assert sum("eval_brightness" in entry for entry in trainer.state.log_history) == 2
    assert "`silent` at step 3: 3 of 3 pictures have no score; the first because of this: no answer" in caplog.text


@pytest.mark.parametrize("was_training", [True, False])
def test_the_mode_of_the_model_survives_an_error(tmp_path, monkeypatch, was_training):
    """Where scoring or logging fails, the model is in the mode that it came in."""

    class Broken(Brightness):
        def score(self, images, prompts, batch_size):
            raise ConnectionError("no judge")

    trainer = make_trainer(tmp_path)
    trainer.model.train(was_training)
    callback = EvaluationCallback(trainer, PROMPTS, [Broken()])
    with pytest.raises(ConnectionError):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.model.training == was_training

    modes = []

    def log(logs):
        modes.append(trainer.model.training)
        raise OSError("disk full")

    monkeypatch.setattr(trainer, "log", log)
    callback = EvaluationCallback(trainer, PROMPTS, [Brightness()])
    with pytest.raises(OSError, match="disk full"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert modes == [False] and trainer.model.training == was_training


def test_nothing_is_logged_where_there_is_nothing(tmp_path):
    """Without any score, the log has only the entries of the training."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Silent()], steps=1))
    trainer.train()
    assert all({"loss", "train_loss"} & entry.keys() for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "prompts, scorers, steps", [([], [Brightness()], 1), (PROMPTS, [], 1), (PROMPTS, [Brightness()], 0)]
)
def test_it_needs_prompts_scorers_and_steps(tmp_path, prompts, scorers, steps):
    """No prompts, no scorers and an interval of zero steps are refused."""
    with pytest.raises(ValueError, match="at least (one|1)"):
        EvaluationCallback(make_trainer(tmp_path), prompts, scorers, steps)


def overflowing(value: float):
    """A pipeline whose VAE decodes everything to one number."""
    pipeline = tiny.sd_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(value)
    return pipeline


def test_samples_that_are_no_pictures(tmp_path, caplog):
    """Neither stops the training nor counts as a score: what is not finite is said, and what is of one colour with its prompts."""
    for value, said in (
        (0.5, "3 of 3 samples of step 0 are of one colour: a red circle"),
        (torch.nan, "There are no samples"),
    ):
        pipeline = overflowing(0.5)
        settings = tiny.FAST | {"max_steps": 1, "num_inference_steps": 1, "sample_prompts": PROMPTS}
        args = InstanceDPOConfig(str(tmp_path / str(value)), **settings)
        trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4))
        pipeline.vae.decoder.conv_out.bias.data.fill_(value)  # after the checks, as an overflow
        trainer.add_callback(EvaluationCallback(trainer, PROMPTS, [Brightness()], steps=1))
        caplog.clear()
        trainer.train()
        assert said in caplog.text and trainer.state.global_step == 1
        assert not any("eval_brightness" in entry for entry in trainer.state.log_history)
        assert (tmp_path / str(value) / "samples").exists() == (value == 0.5)
    assert "There are no scores of step 0. 3 of 3 images have pixels that are not finite" in caplog.text
    with pytest.raises(ValueError, match="not finite, such as the one of 'a red circle'"):
        trainer.sample(PROMPTS)
