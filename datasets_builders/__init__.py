# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Builders of annotated datasets, one package each: `python -m datasets_builders.NAME`."""
