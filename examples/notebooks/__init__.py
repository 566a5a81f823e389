# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0
