# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""`python -m trl_diffusion`, the same as `trl-diffusion`."""

import os
import sys


if __name__ == "__main__":
    # Python looks into the current folder first, where a file or folder may be named like a package, such as `datasets`
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]

    from trl_diffusion.cli import main

    sys.exit(main())
