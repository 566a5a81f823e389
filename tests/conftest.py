# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import os


# Two workers on two cores: threads of torch would only fight over them. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
