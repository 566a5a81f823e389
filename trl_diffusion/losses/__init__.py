# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The objectives as pure functions, from errors of samples to losses and rewards of samples."""

from .complex_po import complex_po_diagnostics, complex_po_loss, reflected_target, strengthened_target
from .kto import diffusion_kto_loss, diffusion_kto_rewards
from .pairs import diffusion_dpo_loss


__all__ = [
    "complex_po_diagnostics",
    "complex_po_loss",
    "diffusion_dpo_loss",
    "diffusion_kto_loss",
    "diffusion_kto_rewards",
    "reflected_target",
    "strengthened_target",
]
