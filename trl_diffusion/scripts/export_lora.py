# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
# ]
# ///

"""
Writes a LoRA a second time, with the names that ComfyUI and A1111 read.

```bash
trl-diffusion export-lora sdxl-cpo --output sdxl-cpo-comfyui.safetensors
```
"""

import argparse
from dataclasses import dataclass, field

from trl_diffusion.cli.parser import CommandParser


@dataclass
class ExportLoraArguments:
    """
    Arguments of `trl-diffusion export-lora`.

    Parameters:
        lora (`str`):
            Folder or Hub id of the LoRA, with or without the flag.
        output (`str`):
            The new file, which ends in `.safetensors`.
    """

    lora: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the LoRA, with or without the flag."}
    )
    output: str | None = field(default=None, metadata={"help": "The new file, which ends in .safetensors."})


def main(args: ExportLoraArguments) -> None:
    from trl_diffusion.lora_export import export_lora

    if not args.lora or not args.output:
        raise ValueError("Name a LoRA and the new file: `trl-diffusion export-lora LORA --output FILE.safetensors`.")
    print(f"Wrote {export_lora(args.lora, args.output)}.")


def make_parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser((ExportLoraArguments,), prog=prog)
    parser.add_argument("lora", nargs="?", default=argparse.SUPPRESS, metavar="LORA", help="the same as --lora")
    return parser


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("export-lora", lambda: sys.modules[__name__]))
