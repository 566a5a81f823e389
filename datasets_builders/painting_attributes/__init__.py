# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Attributes of a criteria tree for paintings, or for any dataset of images."""

from .painting_attributes import PaintingAttributes
