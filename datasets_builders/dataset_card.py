# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The card of a dataset: what a builder says of its annotations, the columns and the pictures in, Markdown out."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from datasets_builders.example_pictures import Picture
from trl_diffusion.annotation.join import entries
from trl_diffusion.annotation.records import STATUSES
from trl_diffusion.annotation.run import Row
from trl_diffusion.annotation.vlm import VLM, Request, shipped_prompt
from trl_diffusion.cards.methods import CITATIONS
from trl_diffusion.cards.text import code_span, fenced, is_hub_id, one_line, plain, python_string
from trl_diffusion.hub_datasets import size_category_of
from trl_diffusion.machine import all_without_places, without_places
from trl_diffusion.scripts.judges import VLMArguments
from trl_diffusion.trainer.origin import declared_license


TEMPLATES = Path(__file__).parent
BLOCK = 1000  # annotation rows that are counted at a time
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
UNKNOWN = "unknown"
UNRESOLVED = "the newest when the recipe is run"
SERVER = "the server's"  # revision of a model behind a server
NAMES_SHOWN = 4  # of a class label
CHARACTERS_SHOWN = 300  # of a text in the row that a card shows
PRIVATE = re.compile(r"(server|url|key|token|secret|password|authorization)$", re.IGNORECASE)


def render_card(
    template: Path,
    described: dict[str, Any],
    infos: dict[str, DatasetInfo],
    name: str,
    *,
    columns: dict[str, tuple[str, str, str]],
    tags: Iterable[str],
    paper: dict[str, str],
    annotations: str,
    license: str | None = None,
    pictures: Iterable[Picture] = (),
) -> DatasetCard:
    """
    Renders a card.

    Args:
        template (`Path`):
            Its Jinja template, which extends `datasets_builders/dataset_card.md`.
        described (`dict`):
            Values of the template. Texts in it may hold anything; the template makes each safe where it stands.
        infos (`dict[str, DatasetInfo]`):
            The configurations. The first is the default.
        name (`str`):
            Hub id or folder of the dataset.
        columns (`dict[str, tuple[str, str, str]]`):
            Shape, unit and meaning of every column and of every field of its objects, such as `instances.label`.
        tags (`Iterable[str]`):
            Tags on the Hub besides those of all datasets.
        paper (`dict[str, str]`):
            What [`trainer.model_card.Method`] says of the paper.
        annotations (`str`):
            Name of the configuration without images, which tells the number of rows.
        license (`str`, *optional*):
            License that the user declares for the annotations.
        pictures (`Iterable[Picture]`, *optional*):
            Pictures of example rows.

    Returns:
        [`~huggingface_hub.DatasetCard`]
    """
    has_images = len(infos) > 1
    measured = described["statuses"] is not None
    annotated = described["annotated"]
    is_public = is_repository(annotated)
    source_license = declared_license(annotated, described["annotated_revision"]) if is_public else None
    data = DatasetCardData(
        pretty_name=plain(name.split("/")[-1]) or "dataset",
        # Images have their own terms, so what is declared for the annotations is not declared for all
        license=plain(license) if license and not has_images else UNKNOWN,
        language=["en"] if described["is_english"] else None,
        annotations_creators=["machine-generated"],
        source_datasets=[annotated] if is_public else None,
        task_categories=["text-to-image"],
        size_categories=[size_category(infos[annotations])] if measured else None,
        tags=["trl-diffusion", "preference-alignment", *tags],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    splits = {config: list(info.splits or described["planned_splits"]) for config, info in infos.items()}
    configs = {
        config: {"data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in of_config]}
        for config, of_config in splits.items()
    }
    configs[next(iter(configs))]["default"] = True
    MetadataConfigs(configs).to_dataset_card_data(data)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": byte_size,
        "code": code_span,
        "fenced": fenced,
        "line": one_line,
        "number": "{:,}".format,
        "python": python_string,
        "repository": is_repository,
    }
    text = environment.get_template(template.name).render(
        described,
        name=name,
        measured=measured,
        is_on_hub="/" in name,
        has_images=has_images,
        license=license,
        source_license=None if source_license == UNKNOWN else source_license,
        paper=paper,
        library=CITATIONS["trl_diffusion"],
        pictures=list(pictures),
        share=share,
        schema={config: describe_columns(info.features, columns) for config, info in infos.items()},
        sizes={config: info.download_size for config, info in infos.items()},
        split=splits[annotations][0],
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def size_category(info: DatasetInfo) -> str:
    """The Hub's category of a number of rows."""
    number = sum(split.num_examples for split in info.splits.values())
    return size_category_of(number)


def byte_size(number: int) -> str:
    """A number of bytes in the largest unit of which there is one."""
    unit = next((unit for unit in ("GB", "MB", "kB") if number >= UNITS[unit]), None)
    return f"{number / UNITS[unit]:.1f} {unit}" if unit else f"{number} bytes"


# ----- columns -----


def describe_columns(features: Features, columns: dict[str, tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """
    Describes columns, and the fields of the objects in them, for a table.

    Args:
        features ([`~datasets.Features`]):
            The columns.
        columns (`dict[str, tuple[str, str, str]]`):
            Shape, unit and meaning by name.

    Returns:
        `list[tuple[str, ...]]`: name, type, shape, unit and meaning of each.
    """
    return [(name, type_name(feature), *columns[name]) for name, feature in fields(features)]


def fields(features: Features | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Columns, each followed by the fields of its objects."""
    for name, feature in features.items():
        yield prefix + name, feature
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, dict):
            yield from fields(inner, f"{prefix}{name}.")


def type_name(feature: Any) -> str:
    """The type as `datasets` shows it, without defaults; of objects and of many class labels only the beginning."""
    if isinstance(feature, List):
        length = f", length={feature.length}" if feature.length >= 0 else ""
        return f"List({type_name(feature.feature)}{length})"
    if isinstance(feature, dict):
        return "{…}"
    if isinstance(feature, ClassLabel) and feature.num_classes > NAMES_SHOWN:
        return f"ClassLabel(num_classes={feature.num_classes})"
    if isinstance(feature, ClassLabel):
        return f"ClassLabel(names={feature.names})"
    return "Image()" if isinstance(feature, Image) else str(feature)


# ----- texts of others -----


def public(name: str) -> str:
    """The name of a dataset or model for publication: of a local path, only the last part."""
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~")) or re.search(r"\\|/.*/", name)
    if not is_path:
        return name
    # An address may end in a query, and that in a token
    return re.split(r"[?#]", re.split(r"[/\\]", name.rstrip("/\\"))[-1])[0] or "a local folder"


def is_repository(name: str | None) -> bool:
    """Whether a public name is that of a repository on the Hub, and not the last part of a path."""
    return "/" in (name or "") and is_hub_id(name)


def describe_role(role: dict[str, Any]) -> dict[str, Any]:
    """
    Describes a role for the card.

    Args:
        role (`dict`):
            Description of the role in the manifest.

    Returns:
        `dict`: `settings` by name, and the `prompt` or `None`.
    """
    found = dict(entries(role))
    prompt = found.pop("prompt.text", None)
    found.pop("prompt.sha256", None)  # the card has the full text
    settings = {name.removeprefix("model."): value for name, value in found.items() if not PRIVATE.search(name)}
    return {"settings": all_without_places(settings) | {"model": public(settings["model"])}, "prompt": prompt}


def models_of(roles: dict[str, dict[str, Any]]) -> dict[str, tuple[str | None, list[str]]]:
    """The models of described roles, each with its revision and the roles that it has."""
    models = {}
    for role, described in roles.items():
        settings = described["settings"]
        revision = settings.get("revision")
        models.setdefault(settings["model"], (None if revision == UNRESOLVED else revision, []))[1].append(role)
    return models


def commit(revision: str | None) -> str | None:
    """The revision if it is a commit of the Hub, and not a hash of a folder or a remark."""
    return revision if re.fullmatch("[0-9a-f]{40}", str(revision)) else None


def vlm_flags(settings: dict[str, Any]) -> dict[str, Any]:
    """The flags of the annotation commands for a vision-language model, from the settings of a described role."""
    return {
        "vlm": settings["model"],
        "vlm_revision": commit(settings.get("revision")),
        "vlm_base_url": "http://localhost:8000/v1" if settings.get("revision") == SERVER else None,
        "vlm_max_new_tokens": settings.get("max_new_tokens"),
    }


class PlannedVLM(VLM):
    """
    The model of a recipe that was not run: it is described, and answers nothing.

    Args:
        args ([`scripts.judges.VLMArguments`]):
            The flags that name it.
    """

    def __init__(self, args: VLMArguments):
        self.args = args

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.args.vlm,
            "revision": UNRESOLVED,
            "decoding": "greedy",
            "max_new_tokens": self.args.vlm_max_new_tokens,
            "dtype": self.args.vlm_dtype,
        }

    def generate(self, requests: list[Request]) -> list[str]:
        raise NotImplementedError("A planned model answers nothing.")


def not_measured(splits: list[str]) -> dict[str, Any]:
    """The values of a card that only a run gives, for a recipe of these splits."""
    return {
        "annotated_split": splits[0],
        "planned_splits": splits,
        "versions": {},
        "statuses": None,
        "example": None,
    }


def is_shipped(role: dict[str, Any], name: str) -> bool:
    """Whether a described role has the prompt of the package, which asks and is answered in English."""
    return role["prompt"] is None or role["prompt"].strip() == shipped_prompt(name).strip()


def example_row(row: Row, features: Features) -> str:
    """A row as JSON with names instead of class labels, and with the beginnings of long texts."""
    return json.dumps(readable(row, features), indent=2, ensure_ascii=False)


def readable(value: Any, feature: Any) -> Any:
    """A value of a column for a reader."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: readable(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, List):
        return [readable(item, feature.feature) for item in value]
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, str) and len(value) > CHARACTERS_SHOWN:
        return value[:CHARACTERS_SHOWN] + "…"
    return value


# ----- figures -----


def blocks(annotations: Dataset) -> Iterator[list[Row]]:
    """Blocks of annotation rows."""
    for start in range(0, len(annotations), BLOCK):
        yield annotations.select(range(start, min(start + BLOCK, len(annotations)))).to_list()


def count_statuses(rows: list[Row]) -> Counter:
    """The number of rows, in total and by status."""
    counts = Counter(dict.fromkeys(("rows", *STATUSES), 0))
    counts.update((STATUSES[row["status"]] for row in rows), rows=len(rows))
    return counts


public_reason = lru_cache(without_places)  # a few reasons are those of millions of rows


def count_reasons(rows: list[Row]) -> Counter:
    """The number of rows that are not ok, by status and beginning of the reason."""
    return Counter(
        (STATUSES[row["status"]], public_reason(re.sub("([:,]).*", "\\1 …", row["reason"], flags=re.DOTALL)))
        for row in rows
        if STATUSES[row["status"]] != "ok"
    )


def count_failures(reasons: dict[str, Counter], roles: Iterable[str]) -> dict[str, int]:
    """
    Counts the rows that a role gave no valid answer for.

    Args:
        reasons (`dict[str, Counter]`):
            What [`count_reasons`] counts, by split.
        roles (`Iterable[str]`):
            Names of the roles, as reasons begin with them.

    Returns:
        `dict[str, int]`: the number by role.
    """
    return {
        role: sum(
            number
            for counts in reasons.values()
            for (status, reason), number in counts.items()
            if status == "error" and re.match(f"{role}[:,]", reason)
        )
        for role in roles
    }


def spread(counts: Counter) -> tuple[int, int, float, int]:
    """
    Describes how numbers are spread.

    Args:
        counts (`Counter`):
            How often each number occurs.

    Returns:
        `tuple`: the least, the median (the lower one of two), the mean and the most.
    """
    total, passed = counts.total(), 0
    for middle in sorted(counts):
        passed += counts[middle]
        if 2 * passed >= total:
            break
    return min(counts), middle, sum(number * times for number, times in counts.items()) / total, max(counts)


def join_versions(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """The package versions of all runs."""
    names = dict.fromkeys(name for manifest in manifests for name in manifest["versions"])
    return {name: ", ".join(dict.fromkeys(manifest["versions"][name] for manifest in manifests)) for name in names}


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
