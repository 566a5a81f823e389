# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Quantising on a CPU, on any in the same way. bitsandbytes can, and transformers does; diffusers refuses before it tries. Here its check
and its choice of a device are replaced, and all else is its own loader.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer


FOUR = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
NESTED = {
    "quant_backend": "bitsandbytes_4bit",
    "quant_kwargs": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
EIGHT = {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}
KINDS = {"4": FOUR, "4-nested": NESTED, "8": EIGHT}


@contextmanager
def quantizing_on_the_cpu() -> Iterator[None]:
    """While the context lasts, diffusers and this library take the CPU for a device to quantise on."""
    with ExitStack() as stack:
        for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
            patches = {
                "validate_environment": lambda self, *args, **kwargs: None,
                "update_device_map": lambda self, device_map: {"": "cpu"},
            }
            for name, function in patches.items():
                stack.enter_context(mock.patch.object(quantizer, name, function))
        stack.enter_context(mock.patch("trl_diffusion.backbones.quantization.has_gpu", lambda: True))
        # Where a CPU has these instructions, bitsandbytes rearranges weights of 4 bits, and takes multiples of 32 rows only
        stack.enter_context(mock.patch("bitsandbytes.nn.modules.has_avx512bf16", lambda: False))
        yield
