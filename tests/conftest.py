# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import gc
import os

import pytest


# Two workers on two cores: threads of torch would only fight over them. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage():
    """
    What a module of tests and its fixtures found in memory is left out of garbage collection: mostly imported code. Every
    training collects, and would look at these million objects each time, which takes longer than its steps.
    """
    gc.collect()
    gc.freeze()
