# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a segmenter of the true size costs: SAM 2.1 large with random weights, on an image of 1024 x 1024 pixels.

```bash
OMP_NUM_THREADS=1 python -m tests.benchmark.segmenter
```

It takes 2.1 GB of memory and a minute on one core of a CPU.
"""

import resource
import tempfile
import time
from pathlib import Path

from transformers import Sam2Config, Sam2Model

from tests import tiny
from tests.annotation.tiny_segmenters import IMAGENET, write_processor
from trl_diffusion.annotation.segmenter import TransformersSegmenter


SIDE = 1024
LARGE = {  # the published settings of SAM 2.1 large, where they are not transformers' defaults
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 144,
    "num_attention_heads": 2,
    "blocks_per_stage": [2, 6, 36, 4],
    "embed_dim_per_stage": [144, 288, 576, 1152],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "window_size_per_stage": [8, 4, 16, 8],
    "global_attention_blocks": [23, 33, 43],
}


def main() -> None:
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": LARGE,
        "backbone_channel_list": [1152, 576, 288, 144],
    }
    with tempfile.TemporaryDirectory() as folder:
        Sam2Model(Sam2Config(vision_config=vision)).save_pretrained(folder)
        write_processor(Path(folder), "Sam2", *IMAGENET, side=SIDE)
        segmenter = TransformersSegmenter(folder)
        print(f"{segmenter.model.num_parameters() / 1e6:.0f} million parameters in float32 on {segmenter.device}")
        for number in (1, 5):
            image = tiny.image(number, SIDE, SIDE)
            start = time.perf_counter()
            segmenter.segment([(image, [0.1 * place, 0.1, 0.1 * place + 0.4, 0.9]) for place in range(number)])
            print(f"an image with {number} boxes: {time.perf_counter() - start:.1f} s")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
