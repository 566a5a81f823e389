# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Model and dataset cards: facts in, Markdown out. Nothing here knows a trainer or loads a model."""
