# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What the server imports that tests fork processes from, see `processes.py`. It imports only, so that no state is shared, and draws
the shapes that the oracle compares images with, which are the same in every process.
"""

import gc

import accelerate.commands.launch  # noqa: F401
import diffusers.guiders  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
from diffusers import StableDiffusionPipeline  # noqa: F401
from PIL import Image

import tests.annotation.test_run  # noqa: F401  # which forks too, and one process has one server
import tests.tiny  # noqa: F401
import trl_diffusion.cli.launch
import trl_diffusion.evaluation.run
import trl_diffusion.scripts.utils
import trl_diffusion.trainer.attribute_sft_trainer
import trl_diffusion.trainer.complex_po_trainer
import trl_diffusion.trainer.instance_dpo_trainer
import trl_diffusion.trainer.model_config  # noqa: F401
from trl_diffusion.quickstart import world


Image.init()  # imports what reads and writes each kind of file
for place in world.PLACES:
    world.templates(place)
gc.freeze()  # a collection in a fork would look at, and so copy, all that was imported
