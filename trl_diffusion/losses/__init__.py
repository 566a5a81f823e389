# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The objectives as pure functions, from errors of samples to losses and rewards of samples."""

from .complex_po import complex_po_diagnostics, complex_po_loss, reflected_target, strengthened_target
from .kto import diffusion_kto_loss, diffusion_kto_rewards
from .pair_terms import PairTerms, image_terms, instance_terms, pair_errors
from .pairs import (
    PAIR_LOSSES,
    PairErrors,
    PairSettings,
    diffusion_dpo_loss,
    dmpo_loss,
    dspo_loss,
    hinge_loss,
    ipo_loss,
    mapo_loss,
    sigmoid_loss,
)
from .safeguards import safeguard_scale, scaled_gradient


__all__ = [
    "PAIR_LOSSES",
    "PairErrors",
    "PairSettings",
    "PairTerms",
    "complex_po_diagnostics",
    "complex_po_loss",
    "diffusion_dpo_loss",
    "dmpo_loss",
    "dspo_loss",
    "hinge_loss",
    "image_terms",
    "instance_terms",
    "ipo_loss",
    "mapo_loss",
    "pair_errors",
    "diffusion_kto_loss",
    "diffusion_kto_rewards",
    "reflected_target",
    "safeguard_scale",
    "scaled_gradient",
    "sigmoid_loss",
    "strengthened_target",
]
