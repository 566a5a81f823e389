# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Types of weights by the names that people write."""

from collections.abc import Collection
from typing import Any

import torch


SPELLINGS = {
    torch.float32: ("float32", "fp32", "float"),
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float16: ("float16", "fp16", "half"),
}
DTYPES = {name: dtype for dtype, names in SPELLINGS.items() for name in names}


def as_dtype(value: Any, where: str, or_auto: bool = False) -> torch.dtype:
    """
    Reads a type of weights.

    Args:
        value (`str` or `torch.dtype`):
            Such as `"bfloat16"`, `"bf16"`, `"torch.bfloat16"` or `torch.bfloat16`.
        where (`str`):
            What the user calls it, for the message.
        or_auto (`bool`, *optional*, defaults to `False`):
            Whether the user may also write `"auto"`, for the message.

    Returns:
        `torch.dtype`

    Raises:
        `ValueError`: If it is none of float32, bfloat16 and float16.
    """
    dtype = DTYPES.get(value.strip().lower().removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in SPELLINGS:
        raise ValueError(f"{where} is {value!r}. Pass {'`auto`, ' if or_auto else ''}{known()}.")
    return dtype


def known() -> str:
    """The names of all types, for messages."""
    *first, last = (f"{names[0]!r} ({' or '.join(map(repr, names[1:]))})" for names in SPELLINGS.values())
    return f"{', '.join(first)} or {last}"


def dtype_of(name: str, dtype: torch.dtype | dict[str, torch.dtype]) -> torch.dtype:
    """The precision of a component."""
    return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype


def check_components(dtype: torch.dtype | dict[str, torch.dtype], components: Collection[str]) -> None:
    """Raises a `ValueError` where a precision is given to a component that a pipeline does not have."""
    given = dtype.keys() - {"default"} if isinstance(dtype, dict) else set()
    if unknown := sorted(given - set(components)):
        names = ", ".join(name for name in components if not name.startswith("_"))
        raise ValueError(
            f"`dtype` names {', '.join(unknown)}, and the pipeline has no such component; it has {names}."
        )


def given_dtype(kwargs: dict[str, Any]) -> torch.dtype | dict[str, torch.dtype] | None:
    """
    Takes the precision that a user asks for, by either of its names, out of the arguments.

    Args:
        kwargs (`dict`):
            The arguments; `dtype` or `torch_dtype` is a type, its name, or a `dict` of these by component, such as
            `{"default": "bfloat16", "vae": "float32"}`.

    Returns:
        `torch.dtype` or `dict[str, torch.dtype]`, or `None` if none is given.

    Raises:
        `ValueError`: If it names no type of weights, or both are given and differ.
    """
    given = [_read_dtype(kwargs.pop(key)) for key in ("dtype", "torch_dtype") if key in kwargs]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            "`dtype` and `torch_dtype` in `model_init_kwargs` differ: they are names of one setting. Pass one of them."
        )
    return given[0] if given else None


def _read_dtype(value: Any) -> torch.dtype | dict[str, torch.dtype]:
    where = "`dtype` in `model_init_kwargs`"
    if isinstance(value, dict):
        return {name: as_dtype(one, f"{where} for {name}") for name, one in value.items()}
    try:
        return as_dtype(value, where)
    except ValueError:
        raise ValueError(
            f"{where} is {value!r}. Pass {known()}, or one of these for each component, by its name."
        ) from None
