# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 of both papers: annotates images with instances or attributes, can be restarted, and accounts for every row."""
