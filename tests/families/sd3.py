# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from tests import tiny

from .family import Call, Family


def read_call(backbone, arguments, output, size) -> Call:
    return Call(arguments["hidden_states"], output[0])


SHORT = {"max_sequence_length": tiny.NUM_T5_TOKENS}
FAMILY = Family(
    make=tiny.sd3_pipeline,
    read_call=read_call,
    settings=SHORT,
    call={"guidance_scale": 1.0, **SHORT},
    guided={"guidance_scale": 2.0, **SHORT},
    branches=(("unconditional", "conditional"),),
    schedules=({"shift": 3.0}, {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}),
)
