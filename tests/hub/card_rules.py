# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Rules that the Hub checks the metadata of a card by, as far as its documentation and its messages tell them."""

import re
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id


NAME = re.compile(r"[a-z0-9.-]+")
LICENSE = re.compile(r"[a-z0-9.+-]+")  # such as `openrail++`
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


class Loader(yaml.SafeLoader):
    """The Hub's parser refuses a key that comes twice, which Python's does not."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"duplicated mapping key {twice!r}")
        return super().construct_mapping(node, deep)


def split_card(text: str) -> tuple[dict[str, Any] | None, str]:
    """The metadata of a card, `None` where it has none, and what follows them."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not found:
        return None, text
    return yaml.load(found.group(1), Loader), text[found.end() :]


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


def is_id(value: str) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def wrong_ids(data: dict[str, Any]) -> list[str]:
    return [
        f'"{name}" with value "{value}" is not valid. Use an id of the Hub.'
        for name in ("datasets", "base_model")
        for value in texts(data.get(name) or [])
        if not is_id(value)
    ]


def wrong_license(data: dict[str, Any]) -> list[str]:
    errors = [
        f'"license" with value "{value}" is not valid'
        for value in texts(data.get("license") or [])
        if not LICENSE.fullmatch(value)
    ]
    if data.get("license_name") is not None and not NAME.fullmatch(str(data["license_name"])):
        errors.append('"license_name" must only contain lowercase letters, digits, "." and "-"')
    return errors


def tables(value: Any) -> list[dict[str, Any]]:
    """The entries of a list as tables, an empty one for what is none."""
    return [entry if isinstance(entry, dict) else {} for entry in value] if isinstance(value, list) else []


def missing(place: str, table: Any, keys: tuple[str, ...]) -> list[str]:
    table = table if isinstance(table, dict) else {}
    return [f'"{place}.{key}" is required' for key in keys if table.get(key) is None]


def wrong_model_index(index: Any) -> list[str]:
    """`model-index` is a list of models with results, of which each has a task, a dataset and metrics."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for m, model in enumerate(tables(index)):
        errors += missing(f"model-index[{m}]", model, ("name", "results"))
        for r, result in enumerate(tables(model.get("results"))):
            place = f"model-index[{m}].results[{r}]"
            errors += missing(f"{place}.task", result.get("task"), ("type",))
            errors += missing(f"{place}.dataset", result.get("dataset"), ("name", "type"))
            errors += missing(place, result, ("metrics",))
            for n, metric in enumerate(tables(result.get("metrics"))):
                errors += missing(f"{place}.metrics[{n}]", metric, ("type", "value"))
    return errors


def wrong_configs(configs: Any) -> list[str]:
    """`configs` of a dataset are a list, and each has a name."""
    if configs is None:
        return []
    if not isinstance(configs, list):
        return ['"configs" must be an array']
    return [
        error
        for n, config in enumerate(tables(configs))
        for error in missing(f"configs[{n}]", config, ("config_name",))
    ]
