# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The evaluation of a model in its card: a section of Markdown, and `model-index` in the metadata."""

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult

from .arms import SFT, W_NEG, needed_arm, training_record
from .facts import EvaluationFacts, ModelFacts, Score
from .tables import CORPUS_DIGITS, SCORE_DIGITS, Cell, Grid, best, decimals, markdown_table
from .text import code_span, one_line


ARMS = {
    W_NEG: ("trained with `w_neg=1`, which is plain Diffusion-DPO", "what the mask adds"),
    SFT: ("fine-tuned on the images (SFT)", "what the contrast adds"),
}
NOT_MEASURED = {
    W_NEG: "No model of the same recipe with `w_neg=1`, which is plain Diffusion-DPO, was evaluated beside this one: what the "
    "mask adds was not measured.",
    SFT: "No model that was fine-tuned on the same images (SFT) was evaluated beside this one: what the contrast adds was not "
    "measured.",
}
READING = (
    "Every score is the output of a model with preferences of its own, so look at images before you trust it. An interval says how "
    "much a figure would vary with other prompts of the same kind, not with other training seeds, and of twenty one is wrong on "
    "average."
)
INTERVALS = (
    "95 % over prompts: of means, Student's t with a standard error whose clusters are the images of a prompt; of win rates, "
    "a percentile bootstrap, which is too narrow for a dozen prompts."
)


# ----- the section -----


def evaluation_section(facts: EvaluationFacts, model: ModelFacts | None) -> str:
    """
    Writes what a card says of an evaluation.

    Args:
        facts ([`cards.facts.EvaluationFacts`]):
            The evaluation.
        model ([`cards.facts.ModelFacts`] or `None`):
            The training, if it is known: which arm the model needs follows from it where the evaluation does not know.

    Returns:
        `str`: Markdown with headings of level 3.
    """
    scores = [f"### {title}\n\n{caption}\n\n{table}" for title, caption, table in tables(facts)]
    parts = [
        *scores,
        *arm_sentences(facts, model),
        READING + corpus_note(facts),
        "### What was compared\n\n" + "\n".join(compared(facts)),
        "### How it was measured\n\n" + "\n".join(measured(facts)),
    ]
    return "\n\n".join(parts)


def tables(facts: EvaluationFacts) -> Iterator[tuple[str, str, str]]:
    """Title, caption and Markdown of the table of scores, and of that of win rates if there is more than one model."""
    baseline, numbers = next(iter(facts.models)), facts.prompts["images"].values()
    images = f"{min(numbers):,}" if len(set(numbers)) == 1 else f"{min(numbers):,} to {max(numbers):,}"
    columns = {name: score_column(facts, name) for name in facts.metrics}
    head = ["Model", *(f"{metric['label']} {arrow(metric)}" for metric in facts.metrics.values())]
    caption = (
        f"Mean scores over {count(facts.prompts['number'], 'prompt')} and {images} images per model, with 95 % intervals over "
        "prompts. ↑ higher is better, ↓ lower is better; the best of each column is bold."
    )
    yield "Scores", caption, table(facts, head, list(facts.models), columns)
    names = list(next(iter(facts.win_rates.values()), {}))
    if names:
        columns = {name: win_rate_column(facts, name) for name in names}
        head = ["Model", *(facts.metrics[name]["label"] for name in names)]
        caption = (
            f"Share in % of the images that score better than that of {one_line(baseline)} for the same prompt and noise, ties one "
            "half, with 95 % intervals over prompts. An interval that contains 50 shows no difference."
        )
        yield "Win rates", caption, table(facts, head, list(facts.win_rates), columns)


def table(facts: EvaluationFacts, head: list[str], models: list[str], columns: dict[str, list[Cell]]) -> str:
    """A table of models, each called what it is to the card."""
    rows = [[columns[name][place] for name in columns] for place in range(len(models))]
    names = [f"{name} ({role})" if (role := role_of(facts, name)) else name for name in models]
    return markdown_table(Grid("", "", head, list(zip(names, rows))), one_line)


def role_of(facts: EvaluationFacts, name: str) -> str:
    """What a model is to the card: `"this model"`, `"base"` or the arm."""
    if name == facts.model:
        return "this model"
    if name == facts.arm:
        return f"{facts.needed_arm} arm" if facts.needed_arm else "arm"
    return "base" if name == facts.base != "base" else ""


def arrow(metric: dict[str, Any]) -> str:
    return "↑" if metric["higher_is_better"] else "↓"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def score_column(facts: EvaluationFacts, name: str) -> list[Cell]:
    """The cells of a metric, a model each."""
    metric = facts.metrics[name]
    scores = [facts.scores[model].get(name) or Score(None) for model in facts.models]
    values = [score.value for score in scores]
    places = decimals(values, CORPUS_DIGITS if metric["full_names"] else SCORE_DIGITS)
    flags = best(values, metric["higher_is_better"], places)
    if len(metric["full_names"]) > 1:
        flags = [False] * len(flags)  # not comparable, for example because of different numbers of images
    return [cell(score, is_best, places) for score, is_best in zip(scores, flags)]


def win_rate_column(facts: EvaluationFacts, name: str) -> list[Cell]:
    """The cells of win rates by a metric, in percent."""
    rates = [in_percent(of_model[name]) for of_model in facts.win_rates.values()]
    return [cell(rate, is_best, 1) for rate, is_best in zip(rates, best([rate.value for rate in rates], True, 1))]


def in_percent(rate: Score) -> Score:
    value, lower, upper = (None if figure is None else 100 * figure for figure in (rate.value, rate.lower, rate.upper))
    return Score(value, lower, upper, rate.number, rate.missing)


def cell(score: Score, is_best: bool, places: int) -> Cell:
    counted = f"{score.number}/{score.number + score.missing}" if score.missing else ""
    if score.value is None:
        return Cell("", counted=counted)
    interval = "" if score.lower is None else f"[{score.lower:.{places}f}, {score.upper:.{places}f}]"
    return Cell(f"{score.value:.{places}f}", interval, counted, is_best)


def corpus_note(facts: EvaluationFacts) -> str:
    """A sentence on the metrics that score all images together, if there are any."""
    names = [metric["label"] for metric in facts.metrics.values() if metric["full_names"]]
    if not names:
        return ""
    return f" {one_line(' and '.join(names))} {'has' if len(names) == 1 else 'have'} no interval: all images are scored together."


# ----- the arm -----


def arm_sentences(facts: EvaluationFacts, model: ModelFacts | None) -> Iterator[str]:
    """What the arm is, or that there is none; and whether the base is there."""
    kind = facts.needed_arm or (model and needed_arm(training_record(model)))
    if facts.arm is not None:
        how, adds = ARMS.get(kind, ("named as the arm without what the method adds", "what the method adds"))
        name = one_line(facts.arm)
        if facts.arm_differences is None:
            yield f"{name} is meant as the arm that was {how}; how far its recipe is that of this model is not recorded."
        elif facts.arm_differences:
            apart = "; ".join(
                f"{code_span(setting)}: {code_span(said(theirs))}, here {code_span(said(ours))}"
                for setting, (theirs, ours) in facts.arm_differences.items()
            )
            arm = "A `w_neg=1` arm" if kind == W_NEG else "An SFT arm"
            yield f"{arm} with other settings: {name} was {how}, but differs in more ({apart}), so the difference to it is not only {adds}."
        else:
            yield f"{name} was {how}, with otherwise the same recipe as this model: the difference between the two is {adds}.{data_note(model)}"
    elif kind:
        yield NOT_MEASURED[kind]
    if facts.base is None:
        yield "The base model is not known to be among the compared models."


def data_note(model: ModelFacts | None) -> str:
    """What could not be compared of data that has no name."""
    if model is None or model.data.name:
        return ""
    return " The data is not on the Hub, so only its number of rows was compared."


def said(value: Any) -> str:
    """A setting's value; `None` where it is not given."""
    return "not given" if value is None else str(value)


# ----- how it was measured -----


def compared(facts: EvaluationFacts) -> Iterator[str]:
    """A line on each model."""
    for place, (name, what) in enumerate(facts.models.items()):
        roles = [role_of(facts, name), "" if place else "the baseline of the win rates"]
        marks = ", ".join(role for role in roles if role)
        yield f"- **{one_line(name)}**{f' ({marks})' if marks else ''}: {one_line(what)}"


def measured(facts: EvaluationFacts) -> Iterator[str]:
    """Prompts, sampling, weights, intervals, what was left out, versions."""
    prompts = facts.prompts
    source = one_line(prompts.get("source") or "not recorded")
    if prompts.get("dataset"):
        source = f"{source}, dataset {one_line(prompts['dataset'])}"
    details = [
        *([f"split {one_line(prompts['split'])}"] if prompts.get("split") else []),
        *(f"{name} {code_span(prompts[name])}" for name in ("revision", "digest") if prompts.get(name)),
    ]
    yield f"- Prompts: {', '.join([source, *details])}"
    settings = [
        f"{'protocol' if name == 'name' else code_span(name)} {one_line(value)}"
        for name, value in facts.protocol.items()
        if value not in (None, "") and name != "unknown"
    ]
    yield f"- Sampling: {', '.join(settings) or 'not recorded'}"
    if unknown := facts.protocol.get("unknown"):
        yield f"- Of the sampling, no public source confirms {one_line(', '.join(unknown))}."
    for metric in facts.metrics.values():
        weights = ", ".join(f"{one_line(name)} ({one_line(revision)})" for name, revision in metric["weights"].items())
        full = f" ({one_line(', '.join(metric['full_names']))})" if metric["full_names"] else ""
        yield f"- {one_line(metric['label'])}{full}: {weights or 'no weights'}"
    yield f"- Intervals: {INTERVALS}"
    yield f"- Left out: {' '.join(left_out(facts)) or 'nothing, every image has every score.'}"
    if facts.versions:
        yield f"- Versions: {', '.join(f'{one_line(name)} {one_line(number)}' for name, number in facts.versions.items())}"


def left_out(facts: EvaluationFacts) -> Iterator[str]:
    """A sentence on each score or pair that is missing."""
    for model, scores in facts.scores.items():
        for name, metric in facts.metrics.items():
            score, of = scores.get(name), f"{one_line(metric['label'])} of {one_line(model)}"
            if score is None or score.value is None:
                yield f"{of} has no value."
            elif score.missing:
                yield f"{of}: {score.missing} of {count(score.number + score.missing, 'image')} without a score."
    for model, rates in facts.win_rates.items():
        for name, rate in rates.items():
            if rate.missing:
                of = f"Win rate of {one_line(model)} by {one_line(facts.metrics[name]['label'])}"
                yield f"{of}: {rate.missing} of {count(rate.number + rate.missing, 'pair')} without both scores."
    for metric in facts.metrics.values():
        if len(metric["full_names"]) > 1:
            yield f"{one_line(metric['label'])}: {one_line(', '.join(metric['full_names']))} are not comparable."


# ----- model-index -----


def eval_results(facts: EvaluationFacts, model_name: str) -> list[EvalResult]:
    """
    The evaluation as `model-index`, for `ModelCardData(eval_results=..., model_name=...)`.

    Scores and win rates of the model come first, then those of its arm, whose types and names say that they are not the model's:
    no leaderboard takes them for it.

    Args:
        facts ([`cards.facts.EvaluationFacts`]):
            The evaluation.
        model_name (`str`):
            Name of the card's model.

    Returns:
        `list[EvalResult]`: one for each value that there is. Intervals are in `metric_args`.
    """
    results = list(results_of(facts, facts.model, "", ""))
    if facts.arm is not None:
        kind = f"{facts.needed_arm} arm" if facts.needed_arm else "arm"
        results += results_of(facts, facts.arm, "_of_arm", f" ({kind}, not {model_name})")
    return results


def results_of(facts: EvaluationFacts, model: str, type_suffix: str, name_suffix: str) -> Iterator[EvalResult]:
    """The values of one model."""
    baseline = next(iter(facts.models))
    for name, score in facts.scores[model].items():
        label = facts.metrics[name]["label"]
        yield from result(facts, f"{name}{type_suffix}", f"{label}{name_suffix}", score)
    for name, rate in facts.win_rates.get(model, {}).items():
        label = f"Win rate by {facts.metrics[name]['label']} against {baseline}"
        yield from result(facts, f"win_rate_{name}{type_suffix}", f"{label}{name_suffix}", rate)


def result(facts: EvaluationFacts, metric_type: str, metric_name: str, score: Score) -> Iterator[EvalResult]:
    """A value, if there is one."""
    if score.value is None:
        return
    interval = {"lower": shortened(score.lower), "upper": shortened(score.upper), "confidence": 0.95}
    number = {} if score.number is None else {"number": score.number}
    prompts = facts.prompts
    source = str(prompts.get("source") or "prompts")
    yield EvalResult(
        task_type="text-to-image",
        task_name="Text-to-Image",
        dataset_type=prompts.get("dataset") or source,
        dataset_name=source,
        dataset_split=prompts.get("split"),
        dataset_revision=prompts.get("revision"),
        dataset_args={name: prompts[name] for name in ("number", "digest") if name in prompts},
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=shortened(score.value),
        metric_args=number | ({} if score.lower is None else interval),
    )


def shortened(value: float | None) -> float | None:
    """A value with six significant digits."""
    return None if value is None else float(f"{value:.6g}")
