# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache of `datasets` is in the temporary folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
