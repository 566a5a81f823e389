# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Rules that the Hub checks the metadata of a card by, as far as its documentation and its messages tell them."""

import re
from typing import Any

import yaml


ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NAME = re.compile(r"[a-z0-9.-]+")
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


def split_card(text: str) -> tuple[dict[str, Any] | None, str]:
    """The metadata of a card, `None` where it has none, and what follows them."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not found:
        return None, text
    return yaml.safe_load(found.group(1)), text[found.end() :]


def texts(value: Any) -> list[str] | None:
    """One text or a list of them as a list; `None` where it is something else."""
    values = [value] if isinstance(value, str) else value
    return values if isinstance(values, list) and all(isinstance(v, str) for v in values) else None


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """
    Checks the metadata of a card.

    Args:
        text (`str`):
            The card.
        kind (`str`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        `tuple[list[str], list[str]]`: errors, for which the Hub refuses the card, and warnings.
    """
    try:
        data, _ = split_card(text)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"], []
    errors = [f'"{name}" must be a string or an array of strings' for name in not_texts(data)]
    if not errors:
        errors += wrong_ids(data) + wrong_license(data)
    errors += wrong_model_index(data.get("model-index")) if kind == "model" else wrong_configs(data.get("configs"))
    if data.get("base_model_relation") not in (None, *RELATIONS):
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    return errors, []


def not_texts(data: dict[str, Any]) -> list[str]:
    names = ("license", "language", "tags", "datasets", "base_model", "metrics", "library_name", "pipeline_tag")
    return [name for name in names if data.get(name) is not None and texts(data[name]) is None]


def wrong_ids(data: dict[str, Any]) -> list[str]:
    return [
        f'"{name}" with value "{value}" is not valid. Use an id of the Hub.'
        for name in ("datasets", "base_model")
        for value in texts(data.get(name) or [])
        if not ID.fullmatch(value)
    ]


def wrong_license(data: dict[str, Any]) -> list[str]:
    errors = [
        f'"license" with value "{value}" is not valid'
        for value in texts(data.get("license") or [])
        if not NAME.fullmatch(value)
    ]
    if data.get("license_name") is not None and not NAME.fullmatch(str(data["license_name"])):
        errors.append('"license_name" must only contain lowercase letters, digits, "." and "-"')
    return errors


def wrong_model_index(index: Any) -> list[str]:
    """`model-index` is a list of models with results, of which each has a task, a dataset and metrics."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for m, model in enumerate(index):
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{m}].name" is required')
        for r, result in enumerate(model.get("results") or []):
            place = f"model-index[{m}].results[{r}]"
            if not result.get("task", {}).get("type"):
                errors.append(f'"{place}.task.type" is required')
            if "dataset" in result:
                errors += [
                    f'"{place}.dataset.{key}" is required'
                    for key in ("name", "type")
                    if not result["dataset"].get(key)
                ]
            for n, metric in enumerate(result.get("metrics") or []):
                errors += [
                    f'"{place}.metrics[{n}].{key}" is required' for key in ("type", "value") if metric.get(key) is None
                ]
    return errors


def wrong_configs(configs: Any) -> list[str]:
    """`configs` of a dataset are a list, and each has a name."""
    if configs is None:
        return []
    if not isinstance(configs, list):
        return ['"configs" must be an array']
    return [
        f'"configs[{n}].config_name" is required' for n, config in enumerate(configs) if not config.get("config_name")
    ]
