# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a LoRA file holds, which anybody may have written: it is checked before peft or diffusers sees it. They match the patterns in its
header with every module's name, and some patterns take for ever.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from re import _constants, _parser  # what `re` itself makes of a pattern
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .messages import cut, shown


MAX_TENSORS = 50_000  # far more than those of the largest models
FLOATS = ("float32", "bfloat16", "float16", "float64")
MAX_PATTERN, MAX_NAME = 2_000, 500  # letters
MAX_WIDE, MAX_DIGITS = 3, 10  # repetitions in a pattern: of anything, and of digits alone, of which names have few
MAX_CHOICES = 10  # alternatives and parts that may be missing
REPETITIONS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
DIGITS = ([(_constants.CATEGORY, _constants.CATEGORY_DIGIT)], [(_constants.RANGE, (ord("0"), ord("9")))])


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) >= 1e30
    )  # or NaN, which those say that use it


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and all(isinstance(name, str) and len(name) <= MAX_NAME for name in value)
    )


def _is_indices(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(index, int) and not isinstance(index, bool) for index in values)


def _is_by_name(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(kind, value.values())))


RANKS, NUMBERS, NAMES = "a whole number of at least 1", "a number", "a name or a list of short names"
# What each setting that bears on a LoRA must be
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, RANKS),
    "lora_alpha": (_is_number, NUMBERS),
    "lora_dropout": (_is_number, NUMBERS),
    "rank_pattern": (_is_by_name(_is_rank), f"{RANKS} for each pattern"),
    "alpha_pattern": (_is_by_name(_is_number), f"{NUMBERS} for each pattern"),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (_is_names, NAMES)),
    "layers_to_transform": (_is_indices, "an index or a list of indices"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "inference_mode"), (_is_bool, "true or false")),
    "init_lora_weights": (lambda value: _is_bool(value) or _is_text(value), "true, false or a name"),
    "use_bdlora": (lambda value: value is None or isinstance(value, bool | dict), "a dictionary or nothing"),
    **dict.fromkeys(("peft_type", "peft_version", "revision", "base_model_name_or_path"), (_is_text, "a text")),
    "auto_mapping": (_is_by_name(lambda _: True), "a dictionary"),
    "runtime_config": (lambda value: value is None, "left out"),
}
# Names a module, which peft imports
IMPORTS = ("megatron_config",)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Reads a LoRA file as it is.

    Args:
        path (`Path`):
            The file.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, Any]]`: the tensors, and the configuration in the file's header, empty where it
        has none.

    Raises:
        `ValueError`: If the file cannot be read, or is empty.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, file.keys()
            if len(keys) > MAX_TENSORS:
                raise ValueError(
                    f"The LoRA {path} holds {len(keys):,} tensors, which is none of a known model. Name another."
                )
            weights = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The LoRA {path} cannot be read: {cut(str(error), 200)}. Download it again.") from error
    if not weights:
        raise ValueError(f"The LoRA {path} holds no weights. Save it again, or name another.")
    if long := next((key for key in weights if len(key) > MAX_NAME or not key.isprintable()), None):
        raise ValueError(
            f"The LoRA {path} holds a tensor of the name {long[:80]!r}, which no model has. Name another."
        )
    return weights, read_header(metadata.get("lora_adapter_metadata", "{}"), path)


def check_finite(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Refuses tensors that hold no numbers, or some that are not finite."""
    for key, value in weights.items():
        is_alpha, dtype = key.endswith(".alpha"), str(value.dtype).removeprefix("torch.")
        if (value.is_complex() or value.numel() != 1) if is_alpha else dtype not in FLOATS:
            raise ValueError(
                f"The LoRA {path} holds {key!r} as {dtype} of shape {tuple(value.shape)}. Save it as {', '.join(FLOATS)}, and alphas as "
                "single numbers."
            )
        if not value.isfinite().all():
            raise ValueError(
                f"The LoRA {path} holds numbers that are not finite, in {key!r}: its training had failed. Name an earlier "
                "checkpoint."
            )


def read_header(text: str, path: Path) -> dict[str, Any]:
    """
    Reads the configuration of a LoRA.

    Args:
        text (`str`):
            The JSON text that diffusers writes into the file's header, with the settings of each component by names such as
            `unet.r`.
        path (`Path`):
            The file, for messages.

    Returns:
        `dict[str, Any]`: the settings by these names.

    Raises:
        `ValueError`: If it is no such text, a setting is not of its kind, or a pattern could take for ever.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The LoRA {path} cannot be read: its configuration is no JSON. Download it again."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"The LoRA {path} cannot be read: its configuration is no dictionary. Save it again.")
    for key, value in header.items():
        setting = key.rpartition(".")[2]
        is_right, kind = KINDS.get(setting, (lambda _: True, ""))
        if not is_right(value):
            raise ValueError(
                f"The LoRA {path} has `{setting}={shown(value)}` in its header, which must be {kind}. Save it again."
            )
        if setting in IMPORTS and value:
            raise ValueError(
                f"The LoRA {path} has `{setting}={shown(value)}` in its header, for which code is imported by its name. Train a "
                "plain LoRA."
            )
        for pattern in _patterns(setting, value):
            if problem := _problem(pattern):
                raise ValueError(
                    f"The LoRA {path} has the pattern {shown(pattern)} as `{setting}` in its header, which {problem}. Save it again "
                    "with the names of its modules."
                )
    return header


def _patterns(setting: str, value: Any) -> Iterable[str]:
    """What peft matches as regular expressions."""
    if setting in ("target_modules", "exclude_modules"):
        return [value] if isinstance(value, str) else ()
    if setting == "layers_pattern":
        return [value] if isinstance(value, str) else value or ()
    return value or () if setting in ("rank_pattern", "alpha_pattern") else ()


def _problem(pattern: str) -> str | None:
    """What is wrong with a pattern, `None` if nothing is."""
    if len(pattern) > MAX_PATTERN:
        return f"has {len(pattern):,} letters"
    try:
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return "is no regular expression"
    repeated = list(_repeated(parsed))
    num_digits = sum(_is_digits(body) for body in repeated)
    # Each repetition beside another multiplies the time by the length of a name, each one inside another squares it or worse
    if len(repeated) - num_digits > MAX_WIDE or num_digits > MAX_DIGITS or _num_choices(parsed) > MAX_CHOICES:
        return "repeats or chooses too often, and could take for ever"
    if any(_branches(body) for body in repeated):
        return "repeats what can itself match in several ways, and could take for ever"
    return None


def _parts(parsed: Any) -> Iterable[tuple[Any, Any]]:
    """All operations in a parsed pattern, however deep, with what they are applied to."""
    waiting = list(parsed)
    while waiting:
        operation, argument = waiting.pop()
        yield operation, argument
        nested = [argument]
        while nested:
            each = nested.pop()
            if isinstance(each, _parser.SubPattern):
                waiting += list(each)
            elif isinstance(each, tuple | list) and operation is not _constants.IN:
                nested += each


def _repeated(parsed: Any) -> Iterable[Any]:
    """What a pattern repeats."""
    for operation, argument in _parts(parsed):
        if operation in REPETITIONS and argument[1] > 1:
            yield argument[2]


def _num_choices(parsed: Any) -> int:
    """How many parts of a pattern may be missing or have alternatives: each may double the time."""
    return sum(
        operation is _constants.BRANCH or (operation in REPETITIONS and argument[:2] == (0, 1))
        for operation, argument in _parts(parsed)
    )


def _is_digits(body: Any) -> bool:
    (operation, argument), *others = body or [(None, None)]
    return not others and operation is _constants.IN and argument in DIGITS


def _branches(body: Any) -> bool:
    """Whether a repeated part repeats or chooses."""
    several = (*REPETITIONS, _constants.BRANCH, _constants.GROUPREF)
    return any(operation in several for operation, _ in _parts(body))
