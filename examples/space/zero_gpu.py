# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""ZeroGPU lends a GPU to a Space for each call of a decorated function. Elsewhere the decorator changes nothing."""

try:
    from spaces import GPU as on_gpu  # installed on ZeroGPU
except ImportError:

    def on_gpu(function):
        return function
