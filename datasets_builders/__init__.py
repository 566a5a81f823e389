# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Builders of the datasets that annotation makes, a package each: `python -m datasets_builders.NAME`."""
