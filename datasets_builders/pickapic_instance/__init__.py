# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Instances for Pick-a-Pic v2, or for any dataset of image pairs."""

from .pickapic_instance import PickapicInstance
