# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "torch",
# ]
# ///

"""
Prints the environment information for a bug report.

```bash
trl-diffusion env
```
"""

import platform
from importlib.metadata import PackageNotFoundError, version

from trl_diffusion.cli.parser import CommandParser


PACKAGES = (
    "trl-diffusion",
    "trl",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "evaluate",
    "torch",
    "bitsandbytes",
    "torchvision",
)


def main() -> None:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"- Platform: {platform.platform()}")
    print(f"- Python: {platform.python_version()}")
    print(f"- Accelerators: {', '.join(devices) or 'none'}")
    for package in PACKAGES:
        try:
            print(f"- {package}: {version(package)}")
        except PackageNotFoundError:
            print(f"- {package}: not installed")


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser(prog=prog, description="Print the environment information.")


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("env", lambda: sys.modules[__name__]))
