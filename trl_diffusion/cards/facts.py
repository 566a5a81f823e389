# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a model card says, as plain data: a trainer collects it, a file beside the card keeps it, and a card is rendered from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_file


FACTS_NAME = "training.json"
RECIPE_NAME = "training.yaml"
EVALUATION_NAME = "evaluation.json"
PICTURES = "images"  # the folder of a card's pictures, beside it


@dataclass
class Sample:
    """
    A prompt that base and policy have sampled from the same noise.

    Attributes:
        prompt (`str`):
            The prompt.
        image (`str`), base_image (`str`):
            Files by the policy and by the base, relative to the card.
    """

    prompt: str
    image: str
    base_image: str


@dataclass
class DataFacts:
    """
    The data of a training. All may be unknown.

    Attributes:
        name (`str`):
            Hub id. `None` for data of the user's machine.
        config (`str`), split (`str`):
            Configuration and split.
        revision (`str`):
            The commit on the Hub.
        license (`str`):
            The licence that the dataset declares.
        num_rows (`int`):
            Number of rows; `None` for a stream.
    """

    name: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    license: str | None = None
    num_rows: int | None = None


@dataclass
class ModelFacts:
    """
    Everything that a model card says of a training. JSON can hold all of it, and nothing in it is a path of the user's machine.

    Attributes:
        name (`str`):
            Name of the model.
        model_id (`str`):
            Hub id of the repository; without one, the name of the folder.
        trainer (`str`), method (`str`), unit (`str`), tags (`list[str]`), paper (`dict[str, str]`):
            The class of the trainer, and what its `Method` says.
        base (`str`), base_revision (`str`):
            Hub id of the base, and the commit. `None` for a base that is not on the Hub.
        base_folder (`str`):
            Of a base that is not on the Hub, the last part of its path: a folder, or a single file.
        base_file (`str`):
            Of a base on the Hub that is a single file, its path in the repository.
        base_changes (`list[str]`):
            What was done to the base after it was loaded.
        initial_lora (`str`), has_initial_lora (`bool`):
            Hub id of the LoRA that the training started at, and whether it started at one.
        pipeline_class (`str`), is_flow (`bool`):
            The pipeline's class, and whether it predicts a velocity.
        is_lora (`bool`), is_exported (`bool`), is_reversed (`bool`):
            Whether a LoRA was trained; whether a file for ComfyUI comes with it; whether the preference was reversed.
        resolution (`int`):
            Width and height in pixels of the training images.
        loading_arguments (`str`), call_arguments (`str`):
            Arguments of `from_pretrained` and of the pipeline's call, as Python code.
        vae (`str`), vae_class (`str`), vae_subfolder (`str`):
            Another VAE than the pipeline's, its class, and its folder where it is that of a pipeline.
        example_prompt (`str`):
            Prompt of the quick start.
        sample_model (`str`), sample_arguments (`str`):
            Hub id of another model that drew with the LoRA, such as a distilled sibling of the base, and the arguments of its call.
        expert (`str`):
            Of CPO, the expert's Hub id or `"not published"`.
        data ([`cards.facts.DataFacts`]):
            The data.
        samples (`list[cards.facts.Sample]`):
            Prompts that base and policy have sampled.
        teaser (`str`), curves (`str`), masks (`str`):
            Pictures, relative to the card: base and policy side by side; what was logged over the steps; masks over images.
        hyperparameters (`dict[str, Any]`):
            What somebody needs to repeat the training, by names as the card shows them.
        recipe (`dict[str, Any]`):
            The training as the keys of a YAML file of the command, without paths of the machine.
        command (`str`), script (`str`):
            The command line that trained, and the command that takes the recipe, such as `"instance-dpo"`.
        last_logs (`dict[str, float]`):
            The metrics of the last log.
        trackers (`dict[str, str]`):
            Addresses of the run by the tracker's name: `"wandb"`, `"trackio"`, `"comet"`.
        hardware (`str`), seconds (`float`):
            What it was trained on, and how long.
        recipe_file (`str`):
            Of a model that nobody has trained yet, the file in this library that says how it would be.
        versions (`dict[str, str]`):
            Versions of the packages.
    """

    name: str
    trainer: str
    method: str
    unit: str
    tags: list[str]
    paper: dict[str, str]
    pipeline_class: str
    resolution: int
    loading_arguments: str
    call_arguments: str
    example_prompt: str
    script: str
    is_lora: bool
    is_flow: bool
    model_id: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_folder: str | None = None
    base_file: str | None = None
    base_changes: list[str] = field(default_factory=list)
    initial_lora: str | None = None
    has_initial_lora: bool = False
    is_exported: bool = False
    is_reversed: bool = False
    vae: str | None = None
    vae_class: str | None = None
    vae_subfolder: str | None = None
    sample_model: str | None = None
    sample_arguments: str | None = None
    expert: str | None = None
    data: DataFacts = field(default_factory=DataFacts)
    samples: list[Sample] = field(default_factory=list)
    teaser: str | None = None
    curves: str | None = None
    masks: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    last_logs: dict[str, float] = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    seconds: float | None = None
    recipe_file: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Score:
    """
    A score of a model, with its interval over prompts.

    Attributes:
        value (`float`):
            The mean, or the value of a score of all images together; `None` without any.
        lower (`float`), upper (`float`):
            The 95 % interval, where there is one.
        number (`int`):
            Number of images that have a score.
        missing (`int`):
            Number of images that have none, such as those of one colour.
    """

    value: float | None
    lower: float | None = None
    upper: float | None = None
    number: int | None = None
    missing: int = 0


@dataclass
class EvaluationFacts:
    """
    What a card says of an evaluation, see [`evaluation.report.summarize`].

    Attributes:
        model (`str`):
            The card's model, among `models`.
        models (`dict[str, str]`):
            What each compared model is, by its name: the first is the baseline.
        arm (`str`):
            The one of `models` that was trained alike without what the method adds: with `w_neg=1` for IAPO, by SFT for CPO. `None`
            if there is none.
        metrics (`dict[str, dict]`):
            By name: `label`, `higher_is_better`, `weights`; of a score of all images together, `full_names`.
        scores (`dict[str, dict[str, cards.facts.Score]]`):
            By model and metric.
        win_rates (`dict[str, dict[str, cards.facts.Score]]`):
            Shares in [0, 1] of the prompts won against the baseline, by model and metric.
        prompts (`dict[str, Any]`):
            `source`, `revision`, `digest` and `number` of the prompts; `dataset`, the Hub id if they are on the Hub, and its `split`;
            `images`, the number of images by model.
        protocol (`dict[str, Any]`):
            How images were sampled.
        versions (`dict[str, str]`):
            Versions of the packages.
        base (`str`):
            The one of `models` that the training started at. `None` if it is not among them.
        needed_arm (`str`):
            The arm that the method needs, `"w_neg=1"` or `"SFT"`. `None` where it needs none, or nothing is known of the training.
        arm_differences (`dict[str, list]`):
            The settings besides in which the arm was trained or sampled otherwise, each with the arm's value and the model's. `None` if
            one of the trainings is not known.
        revision (`str`):
            What the card's model was when it was evaluated: the commit on the Hub, or the hash of its weights.
    """

    model: str
    models: dict[str, str]
    arm: str | None
    metrics: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Score]]
    win_rates: dict[str, dict[str, Score]]
    prompts: dict[str, Any]
    protocol: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    base: str | None = None
    needed_arm: str | None = None
    arm_differences: dict[str, list[Any]] | None = None
    revision: str | None = None


def write_facts(facts: ModelFacts | EvaluationFacts, path: str | Path) -> None:
    """Writes facts as JSON."""
    text = json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n"
    write_file(Path(path), text.encode("utf-8", "replace"))


def read_model_facts(path: str | Path) -> ModelFacts:
    """Reads what [`cards.facts.write_facts`] wrote of a training."""
    known = json.loads(Path(path).read_text(encoding="utf-8"))
    known["data"] = DataFacts(**known["data"])
    known["samples"] = [Sample(**sample) for sample in known["samples"]]
    return ModelFacts(**known)


def read_evaluation_facts(path: str | Path) -> EvaluationFacts:
    """Reads what [`cards.facts.write_facts`] wrote of an evaluation."""
    known = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in ("scores", "win_rates"):
        known[name] = {
            model: {metric: Score(**score) for metric, score in scores.items()}
            for model, scores in known[name].items()
        }
    return EvaluationFacts(**known)
