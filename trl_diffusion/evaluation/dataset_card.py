# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The card of an evaluation that is pushed as a dataset: its tables, its most disputed images, and how to repeat it."""

import io
import shlex
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import jinja2
import PIL.Image
import pyarrow as pa
from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from ..cards.licenses import License, license_of
from ..cards.results import compared, measured, tables
from ..cards.text import code_span, fenced, hub_link, one_line, picture, python_string, shortened
from ..hub_datasets import size_category_of
from ..visualization import image_grid
from .card import dataset_of, evaluation_facts, negative_lora_on
from .gallery import gallery_data
from .names import ON_A_BASE, repository_of
from .prompts import BENCHMARKS
from .protocols import SETTINGS
from .report import LABELS


SPLIT = "train"
DISPUTED = "disputed.jpg"
DISTRIBUTIONS_TITLE, WIN_RATES_TITLE = "Distributions of the scores", "Win rates against {}"
MOST_SHOWN = 4  # prompts in the picture
JUDGED = ("num_negative_attributes", "caption_match")  # metrics whose models are flags of the command
QUALITY = 90


class Disputed(NamedTuple):
    """
    A prompt whose images are shown.

    Attributes:
        prompt (`str`):
            The prompt.
        disagreement (`float`):
            See [`evaluation.gallery.disagreement`].
        scores (`dict[str, list[float | None]]`):
            By metric, the score of each model.
    """

    prompt: str
    disagreement: float
    scores: dict[str, list[float | None]]


def disputed_images(table: pa.Table, output_dir: Path) -> tuple[list[Disputed], bytes | None]:
    """
    Chooses the prompts whose images the metrics disagree about most, and shows them, a row for each model. Where few are disputed, as with one
    metric, others at equal distances follow.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].
        output_dir (`Path`):
            Folder of the evaluation.

    Returns:
        `tuple[list[Disputed], bytes | None]`: the prompts, and the picture as a JPEG file; `None` if no prompt has images of all models.
    """
    data = gallery_data(table)
    rows = [row for row in data["rows"] if None not in row["images"]]
    if not rows:
        return [], None
    chosen = sorted(rows, key=lambda row: -row["disagreement"])[:MOST_SHOWN]
    chosen = [row for row in chosen if row["disagreement"]]
    others = [row for row in rows if row not in chosen]
    number = min(MOST_SHOWN - len(chosen), len(others))
    chosen += [others[place * len(others) // number] for place in range(number)]
    shown = []
    for row in chosen:
        shown.append([])
        for file in row["images"]:
            with PIL.Image.open(output_dir / unquote(file)) as image:
                shown[-1].append(image.convert("RGB"))
    grid = image_grid([*map(list, zip(*shown))], [row["prompt"] for row in chosen], data["models"])
    buffer = io.BytesIO()
    grid.save(buffer, format="JPEG", quality=QUALITY)
    names = [metric["name"] for metric in data["metrics"]]
    disputed = [
        Disputed(row["prompt"], row["disagreement"], dict(zip(names, map(list, zip(*row["scores"])))))
        for row in chosen
    ]
    return disputed, buffer.getvalue()


def evaluation_card(
    summary: dict[str, Any],
    info: DatasetInfo,
    repo_id: str,
    revision: str | None,
    pictures: dict[str, str],
    disputed: list[Disputed],
) -> DatasetCard:
    """
    Writes the card.

    Args:
        summary (`dict`):
            Summary from [`evaluation.report.summarize`], without paths of the machine.
        info ([`~datasets.DatasetInfo`]):
            Columns and split of the dataset.
        repo_id (`str`):
            Name of the repository.
        revision (`str`, *optional*):
            Branch of the repository.
        pictures (`dict[str, str]`):
            Files of the plots by title.
        disputed (`list[Disputed]`):
            Prompts of the picture `DISPUTED`, if there is one.

    Returns:
        [`~huggingface_hub.DatasetCard`]
    """
    settings = summary["settings"]
    facts = replace(
        evaluation_facts(summary, summary["baseline"]), model="", arm=None, base=None
    )  # no model is the card's
    number = info.splits[SPLIT].num_examples
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        license="unknown",
        task_categories=["text-to-image"],
        size_categories=[size_category_of(number)],
        source_datasets=[facts.prompts["dataset"]] if facts.prompts["dataset"] else None,
        tags=["trl-diffusion", "evaluation", "text-to-image"],
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = {"data_files": [{"split": SPLIT, "path": f"data/{SPLIT}-*"}], "default": True}
    MetadataConfigs({"default": files}).to_dataset_card_data(data)
    template = resources.files("trl_diffusion").joinpath("templates", "evaluation_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": one_line, "code": code_span, "python": python_string, "fenced": fenced}
    environment.filters |= {"link": hub_link, "short": shortened, "number": "{:,}".format}
    prompts, command = settings.get("prompts", {}), command_of(summary)
    text = environment.from_string(template).render(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        revision=revision,
        split=SPLIT,
        summary=summary,
        models=list(summary["models"]),
        baseline=summary["baseline"],
        num_images=number,
        num_prompts=summary["num_prompts"],
        source=prompts.get("source") or "prompts",
        source_dataset=dataset_of(prompts),
        prompts_revision=prompts.get("revision"),
        tables=list(tables(facts)),
        compared=list(compared(facts)),
        measured=list(measured(facts)),
        without_score=list(without_score(summary)),
        plots=[picture(file, title) for title, file in pictures.items()],
        disputed=disputed,
        most_disputed=[shown for shown in disputed if shown.disagreement],
        disputed_picture=picture(DISPUTED, "Images of every model for the same prompt and noise"),
        label=lambda name: LABELS.get(name, name),
        arrow=lambda name: "↑" if summary["metrics"][name]["higher_is_better"] else "↓",
        metrics=[name for name in info.features if name in summary["metrics"]],
        corpus=[name for name in summary["metrics"] if name not in info.features],
        licenses=licenses_of(settings),
        command=command,
        is_local="path/to/" in command,
        is_judged=any(name in JUDGED for name in summary["metrics"]),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def licenses_of(settings: dict[str, Any]) -> dict[str, License | None]:
    """The licences of the models that drew the images, as far as they are known, by their Hub ids."""
    named = {}
    for record in settings.get("models", {}).values():
        for key in ("path", "base", "negative_lora", "vae"):
            if (
                record.get(key)
                and record["kind"] != "images"
                and not is_local(record.get(f"{key}_revision", record["revision"]))
            ):
                name = repository_of(record[key])
                named[name] = license_of(name)
    return named


def without_score(summary: dict[str, Any]) -> Iterator[str]:
    """How many images of a model lack a score, with the first reasons."""
    for model, scores in summary["scores"].items():
        for name, score in scores.items():
            if score.get("num_errors"):
                reasons = "; ".join(
                    f"{one_line(error['image'])}: {one_line(error['reason'])}" for error in score["errors"]
                )
                more = "; …" if score["num_errors"] > len(score["errors"]) else ""
                total = score["num_scored"] + score["num_errors"]
                of = f"{one_line(LABELS.get(name, name))} of {one_line(model)}"
                yield f"{of}: {score['num_errors']} of {total} images. {reasons}{more}"


# ----- the command -----


def command_of(summary: dict[str, Any]) -> str:
    """
    The command that repeats an evaluation, as far as its summary tells. Folders and files of the machine are `path/to/NAME`.

    Args:
        summary (`dict`):
            Summary from [`evaluation.report.summarize`].

    Returns:
        `str`: the command, a flag each line.
    """
    settings = summary["settings"]
    records, prompts = settings.get("models", {}), settings.get("prompts", {})
    flags = {"models": [f"{name}={where(record['path'], record['revision'])}" for name, record in records.items()]}
    loras = [record for record in records.values() if record["kind"] in ON_A_BASE]
    bases = {where(record["base"], record["base_revision"]) for record in loras}
    if any(record.get("trained_on") for record in loras):
        flags["base_model"], flags["sample_model"] = (
            sorted({r["trained_on"] for r in loras if r.get("trained_on")})[:1],
            bases,
        )
    elif len(bases) == 1:
        flags["base_model"] = bases
    flags["negative_loras"] = [
        f"{name}={where(record['negative_lora'], record['negative_lora_revision'])}"
        for name, record in records.items()
        if record.get("negative_lora")
    ]
    flags["negative_loras_on_base"] = [name for name, record in records.items() if negative_lora_on(record) == "base"]
    flags["vae"] = {where(record["vae"], record["vae_revision"]) for record in records.values() if record.get("vae")}
    source, revision = str(prompts.get("source")), prompts.get("revision")
    flags["prompts"] = [source if source in BENCHMARKS or revision else f"path/to/{source}"]
    flags["prompt_revision"] = [revision] if revision else []
    flags["num_prompts"] = [summary["num_prompts"]]
    protocol = settings.get("protocol", {})
    flags |= {name: [protocol[name]] for name in SETTINGS if protocol.get(name) is not None}
    flags["metrics"] = list(summary["metrics"])
    flags["references"] = (
        ["path/to/references"] if any("value" in s for s in summary["scores"][summary["baseline"]].values()) else []
    )
    lines = [
        " ".join([f"--{name}", *(shlex.quote(str(value)) for value in values)])
        for name, values in flags.items()
        if values
    ]
    return " \\\n    ".join(["trl-diffusion evaluate", *lines, "--output_dir evaluation"])


def where(name: str, revision: str | None) -> str:
    """A Hub id, or a place in which a folder or file of the machine would be."""
    return f"path/to/{name}" if is_local(revision) else name


def is_local(revision: str | None) -> bool:
    """Whether a revision is the hash of a folder or file of the machine, and not a commit on the Hub."""
    return str(revision).startswith("sha256:")
