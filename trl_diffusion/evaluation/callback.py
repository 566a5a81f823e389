# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Scores during training."""

import PIL.Image
from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..metrics.scorer import Scorer, Scores
from ..metrics.win_rate import win_rate
from ..sampling import NotFiniteError, only_colour


logger = get_logger(__name__)


class EvaluationCallback(TrainerCallback):
    """
    Samples images for a few prompts, always from the same noise, and scores them: before training, every `steps` steps and after
    the last one. Logs, for each scorer, `eval_<name>`, the mean score, and `eval_<name>_win_rate`, the share of the prompts
    whose picture scores better than that of the model before training, ties one half. A figure that no picture got a score
    for is left out, with a warning.

    Images are sampled with the trainer's `num_inference_steps` and `guidance_scale`.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, of any method.
        prompts (`list[str]`):
            The prompts.
        scorers (`list[Scorer]`):
            What scores, such as [`metrics.pickscore.PickScoreScorer`].
        steps (`int`, *optional*, defaults to `100`):
            Optimizer steps between two evaluations.

    Raises:
        `ValueError`: If there are no prompts or no scorers, or `steps` is not positive.

    Example:

    ```python
    from trl_diffusion import EvaluationCallback
    from trl_diffusion.metrics.pickscore import PickScoreScorer

    trainer.add_callback(EvaluationCallback(trainer, ["an eagle over a lake", "two cats"], [PickScoreScorer()], steps=50))
    ```
    """

    def __init__(self, trainer, prompts: list[str], scorers: list[Scorer], steps: int = 100):
        if not prompts or not scorers:
            raise ValueError("An `EvaluationCallback` needs at least one prompt and one scorer.")
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        if trainer.reference is None:
            trainer.set_reference(None)  # of a method that needs none: the model before training
        self.trainer = trainer
        self.prompts = prompts
        self.scorers = scorers
        self.steps = steps
        self.base_scores: dict[str, list[float | None]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self._evaluate(state, control)

    def _evaluate(self, state, control):
        if not state.is_world_process_zero:
            return
        try:
            if not self.base_scores:
                images = self.trainer.sample(self.prompts, with_reference=True)
                self.base_scores = {scorer.name: self._score(scorer, images).values for scorer in self.scorers}
            images, logs = self.trainer.sample(self.prompts), {}
        except NotFiniteError as error:
            logger.warning(f"There are no scores of step {state.global_step}. {error}")
            return
        for scorer in self.scorers:
            scores, base_scores = self._score(scorer, images), self.base_scores[scorer.name]
            if scores.errors:
                logger.warning(
                    f"`{scorer.name}` at step {state.global_step}: {len(scores.errors)} of {len(images)} pictures have no "
                    f"score; the first because of this: {next(iter(scores.errors.values()))}"
                )
            if not scores.scored:
                continue
            logs[f"eval_{scorer.name}"] = scores.mean
            if any(None not in pair for pair in zip(scores.values, base_scores, strict=True)):
                compared = win_rate(scores.values, base_scores, scorer.higher_is_better)
                logs[f"eval_{scorer.name}_win_rate"] = compared["win_rate"]
        if not logs:
            return
        model, should_log = self.trainer.model, control.should_log
        was_training = model.training
        model.eval()  # as the Trainer evaluates: what training has recorded since its last log stays there
        try:
            self.trainer.log(logs)
        finally:
            model.train(was_training)
        control.should_log = should_log  # which a log takes back: the step's own is still to come

    def _score(self, scorer: Scorer, images: list[PIL.Image.Image]) -> Scores:
        scores = scorer.score(images, self.prompts, batch_size=self.trainer.args.per_device_eval_batch_size)
        for place, image in enumerate(images):
            if only_colour(image):  # no picture
                scores.values[place], scores.errors[place] = None, "all of it is one colour"
        return scores
