# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 of both papers: from images to instances and attributes, restartable, honest about every row."""
