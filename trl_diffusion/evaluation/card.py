# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a model card says of an evaluation: a summary in, the facts of a card out."""

import math
from typing import Any

from ..cards.arms import SFT, W_NEG, differences, is_arm, needed_arm
from ..cards.facts import EvaluationFacts, Score
from .names import ON_A_BASE
from .prompts import BENCHMARKS
from .report import CONFIDENCE, LABELS, full_names


# How images were sampled, besides the protocol: what must be the same for a model and its arm
SAMPLED_WITH = (
    *("kind", "base", "base_revision", "negative_lora", "negative_lora_revision", "negative_lora_on"),
    *("vae", "vae_revision", "guidance_scale"),
)


def evaluation_facts(
    summary: dict[str, Any], model: str, arm: str | None = None, descriptions: dict[str, str] | None = None
) -> EvaluationFacts:
    """
    Makes the facts of a model card out of an evaluation.

    The interval of a mean is `mean ± t * SE` with the standard error over prompts, see [`evaluation.report.standard_error`], and
    Student's t with one degree of freedom less than there are prompts with a score. That of a win rate is the summary's bootstrap.
    FID and KID, which score all images together, have none.

    Args:
        summary (`dict[str, Any]`):
            Summary from [`evaluation.report.summarize`], as in `summary.json`.
        model (`str`):
            Name of the card's model in the evaluation.
        arm (`str`, *optional*):
            Name of the model that was trained alike without what the method adds: with `w_neg=1` for IAPO, by SFT for CPO. By
            default it is found by what trainers write beside a model; of several, it is the one whose settings differ least.
        descriptions (`dict[str, str]`, *optional*):
            What a model is, by its name, in place of what the summary says.

    Returns:
        [`cards.facts.EvaluationFacts`]

    Raises:
        `ValueError`: If the summary is not one, a model is not in it, or `arm` is known not to be the arm that the model needs.
    """
    if not isinstance(summary, dict) or not {"models", "metrics", "scores", "win_rates"} <= summary.keys():
        raise ValueError(
            "This is no summary of an evaluation: pass the content of summary.json of `trl-diffusion evaluate`."
        )
    for name in (model, *([arm] if arm else []), *(descriptions or {})):
        if name not in summary["models"]:
            raise ValueError(f"The evaluation has no model {name!r}; it has {', '.join(summary['models'])}.")
    settings, models = summary["settings"], summary["models"]
    records = {name: settings.get("models", {}).get(name, {}) for name in models}
    kind, arm, apart = find_arm(records, model, arm)
    return EvaluationFacts(
        model=model,
        models={name: (descriptions or {}).get(name) or describe(record) for name, record in records.items()},
        arm=arm,
        metrics={
            name: {
                "label": LABELS.get(name, name),
                **metric,
                "full_names": full_names([summary["scores"][each].get(name) for each in models]),
            }
            for name, metric in summary["metrics"].items()
        },
        scores={
            each: {
                name: card_score(score, models[each], summary["num_prompts"])
                for name, score in summary["scores"][each].items()
            }
            for each in models
        },
        win_rates={
            each: {
                name: Score(rate["win_rate"], rate["lower"], rate["upper"], rate["num_pairs"], rate["left_out"])
                for name, rate in rates.items()
            }
            for each, rates in summary["win_rates"].items()
        },
        prompts={
            **settings.get("prompts", {}),
            "number": summary["num_prompts"],
            "dataset": dataset_of(settings.get("prompts", {})),
            "images": dict(models),
        },
        protocol=dict(settings.get("protocol", {})),
        versions=dict(settings.get("versions", {})),
        base=find_base(records, model),
        needed_arm=kind,
        arm_differences=apart,
        revision=records[model].get("revision"),
    )


# ----- scores -----


def card_score(score: dict[str, Any], num_images: int, num_prompts: int) -> Score:
    """A score of a summary, with its interval."""
    if "value" in score:
        return Score(score["value"], number=score.get("num_images"))
    mean, error = score["mean"], score["standard_error"]
    number, missing = score["num_scored"], score["num_errors"]
    if mean is None or error is None:
        return Score(mean, number=number, missing=missing)
    # At least so many prompts have a score: where some images have none, the interval is rather too wide
    prompts = math.ceil(number / math.ceil(num_images / num_prompts))
    half = t_quantile(CONFIDENCE, max(1, prompts - 1)) * error
    return Score(mean, mean - half, mean + half, number, missing)


def t_quantile(confidence: float, degrees: int) -> float:
    """
    The `t` for which a variable with Student's distribution lies in `[-t, t]` with a given probability.

    Args:
        confidence (`float`):
            The probability.
        degrees (`int`):
            Degrees of freedom, at least 1.

    Returns:
        `float`
    """
    low, high = 0.0, math.pi / 2  # of arctan(t / sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def within(angle: float, degrees: int) -> float:
    """
    The probability of `[-t, t]` under Student's distribution, with `t = sqrt(degrees) * tan(angle)` (Abramowitz and Stegun, 26.7.3 and
    26.7.4).
    """
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


# ----- models -----


def find_arm(
    records: dict[str, dict[str, Any]], model: str, arm: str | None
) -> tuple[str | None, str | None, dict[str, list[Any]] | None]:
    """
    Finds the arm of a model among the evaluated ones.

    Args:
        records (`dict[str, dict]`):
            What the summary says of each model.
        model (`str`):
            The model.
        arm (`str` or `None`):
            The arm that was named by hand.

    Returns:
        `tuple`: the kind of the arm that the model needs, its name, and the settings in which it differs besides.

    Raises:
        `ValueError`: If the arm that was named is none.
    """
    own = records[model].get("training")
    kind = own and needed_arm(own)
    trainings = {name: record["training"] for name, record in records.items() if "training" in record}
    if arm is not None:
        if arm == model:
            raise ValueError(f"{model!r} cannot be its own arm: name another model of the evaluation.")
        if own and kind is None:
            raise ValueError(
                f"{model!r} was trained with {own['method']} and needs no arm beside it: leave `arm` out."
            )
        if arm in trainings and kind and not is_arm(trainings[arm], kind):
            raise ValueError(f"{arm!r} is no {WANTED[kind]}: it was trained with {said(trainings[arm])}.")
    if kind is None:
        return None, arm, None
    candidates = {
        name: differences(own, training, kind) | sampled_apart(records[model], records[name])
        for name, training in trainings.items()
        if name != model and is_arm(training, kind) and arm in (None, name)
    }
    found = min(candidates, key=lambda name: len(candidates[name]), default=arm)
    return kind, found, candidates.get(found)


WANTED = {W_NEG: "model trained with `w_neg=1`", SFT: "fine-tuned model (SFT)"}


def sampled_apart(own: dict[str, Any], arm: dict[str, Any]) -> dict[str, list[Any]]:
    """In what a model and its arm were sampled otherwise, each with the arm's value and the model's."""
    own, arm = (record | {"negative_lora_on": negative_lora_on(record)} for record in (own, arm))
    names = [name for name in SAMPLED_WITH if own.get(name) != arm.get(name)]
    return {f"sampled with {name}": [arm.get(name), own.get(name)] for name in names}


def find_base(records: dict[str, dict[str, Any]], model: str) -> str | None:
    """The evaluated pipeline that a model was trained from, if it is there."""
    record = records[model]
    drawn_by = record.get("base") if record.get("kind") in ON_A_BASE else None
    base = record.get("training", {}).get("base") or record.get("trained_on") or drawn_by
    pipelines = [name for name, other in records.items() if other.get("kind") == "pipeline" and name != model]
    return next((name for name in pipelines if records[name]["path"] == base), None)


def dataset_of(prompts: dict[str, Any]) -> str | None:
    """The dataset of the Hub that prompts are from."""
    source = prompts.get("source")
    if source in BENCHMARKS:
        return BENCHMARKS[source].repo_id
    return source if prompts.get("revision") else None


def describe(record: dict[str, Any]) -> str:
    """What a model is, in a few words."""
    if not record:
        return "not described"
    base = record.get("base")
    what = {
        "lora": f"LoRA on {base}",
        "denoiser": f"denoiser of {base}",
        "pipeline": "pipeline",
        "images": "images drawn elsewhere",
    }
    parts = [f"{record['path']} ({record['revision']}), {what[record['kind']]}"]
    if record.get("trained_on"):
        parts.append(f"trained on {record['trained_on']}")
    if "training" in record:
        parts.append(f"trained with {said(record['training'])}")
    if record.get("negative_lora"):
        on = {None: "", "aligned": " on top of it", "base": " on the base alone"}[negative_lora_on(record)]
        parts.append(f"guided by {record['negative_lora']}{on} in the unconditional branch")
    if record.get("vae"):
        parts.append(f"VAE {record['vae']}")
    return ", ".join(parts)


def negative_lora_on(record: dict[str, Any]) -> str | None:
    """What a LoRA's negative LoRA was added to. Evaluations that do not say it are older, and added it to the base alone."""
    if record.get("negative_lora") and record.get("kind") == "lora":
        return record.get("negative_lora_on", "base")
    return None


def said(training: dict[str, Any]) -> str:
    """A training in a few words."""
    names = ("w_neg", "attribute_dropout", "loss_type", "reverse_preference")
    known = {name: training["settings"].get(name) for name in names}
    settings = [f"{name}={value}" for name, value in known.items() if value is not None and value is not False]
    return " ".join([training["method"], *([f"({', '.join(settings)})"] if settings else [])])
