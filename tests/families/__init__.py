# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A tiny pipeline of each family of flow transformers, one module each, and the laws that every family keeps (`test_laws.py`)."""

import importlib
import pkgutil

from .family import Call, Family


FAMILIES: dict[str, Family] = {
    name: importlib.import_module(f"{__name__}.{name}").FAMILY
    for _, name, _ in pkgutil.iter_modules(__path__)
    if name != "family" and not name.startswith("test_")
}

__all__ = ["FAMILIES", "Call", "Family"]
