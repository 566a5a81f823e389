# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from tests import tiny

from .family import Call, Family


def read_call(backbone, arguments, output, size) -> Call:
    def unpack(packed):
        return backbone.pipeline._unpack_latents(packed, *size, backbone.vae_scale_factor)

    return Call(unpack(arguments["hidden_states"]), unpack(output[0]))


SHORT = {"max_sequence_length": tiny.NUM_T5_TOKENS}
FAMILY = Family(
    make=tiny.flux_pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call={"guidance_scale": 1.0, **SHORT},
    guided={"guidance_scale": 1.0, "true_cfg_scale": 2.0, "negative_prompt": ["", ""], **SHORT},
    branches=(("conditional",), ("unconditional",)),
    schedules=({}, {"shift_terminal": 0.2}),
)
