# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The console entry, `trl-diffusion`."""

from .main import main


__all__ = ["main"]
