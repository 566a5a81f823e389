# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What one wants to see in a notebook, each by one call: a pair with its verdicts, masks, samples side by side, curves."""

from .curves import TrainingCurves, show_curves
from .pairs import Pair, show_masks, show_pair
from .picture import Picture
from .samples import Samples, show_samples
