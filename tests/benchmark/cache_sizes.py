# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
The space that precomputed prompts and latents take at the true size of each family, computed from shapes: the size that is said before
anything is encoded, for rows of zeros. And, measured, what a short training on a tiny flow model with text encoders in bf16 leaves on
the disk, beside the same with every row encoded.

```bash
python -m tests.benchmark.cache_sizes --output sizes.json
```
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Features, List, Value

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.data.buckets import TRAINING_SIZE
from trl_diffusion.data.caching import ROWS_AT_ONCE, ROWS_PER_FILE, TENSORS, write_example
from trl_diffusion.data.encoded_files import EncodedFiles


PROMPTS = 58_960  # different ones, of the 851,293 pairs of Pick-a-Pic
PAIRS = 8192
TOKENS = 30  # of a typical prompt

# Of one prompt: sequences, (length as the pipeline pads it or None for the prompt's own, tokens of the template, width), then vectors
FAMILIES = {
    "SDXL": ([(77, 0, 2048)], [1280], 4),
    "Stable Diffusion 3.5": ([(77 + 256, 0, 4096)], [2048], 16),
    "FLUX.1": ([(512, 0, 4096)], [768], 16),
    "Z-Image": ([(None, 8, 2560)], [], 16),
    "FLUX.2 klein 4B": ([(512, 0, 7680)], [], 32),
    "Qwen-Image": ([(None, 5, 3584)], [], 16),
}


def size(row: dict, features: dict, number: int) -> int:
    """Bytes of the files of so many rows."""
    counts = [ROWS_PER_FILE] * (number // ROWS_PER_FILE) + [number % ROWS_PER_FILE] * (number % ROWS_PER_FILE > 0)
    with tempfile.TemporaryDirectory() as folder:
        files = EncodedFiles(Path(folder), "rows", Features({**features, TENSORS: Value("large_binary")}))
        return files.expected_size(write_example(row), counts, ROWS_AT_ONCE, more=0)


def of_prompts(family: str, dtype: torch.dtype, number: int, is_padded: bool = False) -> int:
    """Bytes of prompts of 30 tokens; padded to 512 where a family would not have to be."""
    sequences, vectors, _ = FAMILIES[family]
    row = {"prompt": "x" * 4 * TOKENS}
    for place, (length, template, width) in enumerate(sequences):
        own = 512 if is_padded else TOKENS + template
        row[f"prompt_embeds_{place}"] = torch.zeros(length or own, width, dtype=dtype)
        if length is None:
            row["prompt_lengths"] = torch.tensor(own)
    row |= {f"vector_{place}": torch.zeros(width, dtype=dtype) for place, width in enumerate(vectors)}
    return size(row, {"prompt": Value("string")}, number)


def of_pairs(family: str, dtype: torch.dtype, number: int, side: int = 128) -> int:
    """Bytes of pairs at 1024 pixels, with two instances each."""
    row = {"id": "0" * 36, "prompt": "x" * 4 * TOKENS, TRAINING_SIZE: [1024, 1024]}
    for column in ("chosen", "rejected"):
        row |= {
            f"{column}_latents_{what}": torch.zeros(FAMILIES[family][2], side, side, dtype=dtype)
            for what in ("mean", "std")
        }
        row |= {f"{column}_boxes": torch.zeros(2, 4), f"{column}_original_sizes": torch.zeros(2, dtype=torch.int64)}
        row[f"{column}_crop_top_lefts"] = torch.zeros(2, dtype=torch.int64)
    row |= {"judged": torch.zeros(2, dtype=torch.bool), "conflicts": torch.zeros(2, dtype=torch.bool)}
    features = {"id": Value("string"), "prompt": Value("string"), TRAINING_SIZE: List(Value("int32"))}
    return size(row, features, number)


def tiny_flow(folder: Path, rows: int, max_steps: int, dtype: str) -> dict[str, int]:
    """Bytes that precomputing for a training leaves on the disk, by kind."""
    pipeline = tiny.sd3_pipeline()
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, name).to(torch.bfloat16)
    settings = tiny.FAST | {"max_steps": max_steps, "bf16": True, "use_cpu": True, "precompute_dtype": dtype}
    settings |= {"precompute": True, "precompute_dir": str(folder), "resolution": 64, "precompute_ref_preds": True}
    dataset = tiny.pairs(rows).map(lambda row, index: {"prompt": f"a red cat {index}"}, with_indices=True)
    args = InstanceDPOConfig(str(folder / "output"), **settings, **tiny.settings(pipeline))
    InstanceDPOTrainer(pipeline, args=args, train_dataset=dataset, peft_config=tiny.lora())
    kinds = {"images": "images-*", "prompts": "prompts-*", "predictions": "noised-*"}
    return {kind: sum(path.stat().st_size for path in folder.glob(f"{glob}.arrow")) for kind, glob in kinds.items()}


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    rows = [header, ["---"] * len(list(header)), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--rows", type=int, default=128, help="rows of the tiny dataset")
    args = parser.parse_args()
    result = {"prompts": PROMPTS, "pairs": PAIRS, "families": {}, "tiny": {}}
    for family in FAMILIES:
        is_ragged = FAMILIES[family][0][0][0] is None
        result["families"][family] = {
            "bytes of a prompt": of_prompts(family, torch.bfloat16, PROMPTS) / PROMPTS,
            "prompts": of_prompts(family, torch.bfloat16, PROMPTS),
            "prompts, padded": of_prompts(family, torch.bfloat16, PROMPTS, is_padded=True) if is_ragged else None,
            "bytes of a pair": of_pairs(family, torch.float32, PAIRS) / PAIRS,
            "bytes of a pair in float16": of_pairs(family, torch.float16, PAIRS) / PAIRS,
            "pairs": of_pairs(family, torch.float32, PAIRS),
        }
    header = [
        "",
        "kB a prompt",
        "GB of 58,960",
        "the same padded to 512",
        "MB a pair, float32",
        "float16",
        "GB of 8,192 pairs",
    ]
    print(
        table(
            header,
            (
                [
                    name,
                    f"{found['bytes of a prompt'] / 1e3:.1f}",
                    f"{found['prompts'] / 1e9:.1f}",
                    f"{found['prompts, padded'] / 1e9:.1f}" if found["prompts, padded"] else "",
                    f"{found['bytes of a pair'] / 1e6:.2f}",
                    f"{found['bytes of a pair in float16'] / 1e6:.2f}",
                    f"{found['pairs'] / 1e9:.2f}",
                ]
                for name, found in result["families"].items()
            ),
        )
    )
    for steps in (args.rows // 8, args.rows // 2):  # a quarter of an epoch, and an epoch, of batches of two
        for dtype in ("float32", "float16"):
            with tempfile.TemporaryDirectory() as folder:
                result["tiny"][f"{steps} steps, {dtype}"] = tiny_flow(Path(folder), args.rows, steps, dtype)
    print(table(["", *found_kinds(result)], ([name, *found.values()] for name, found in result["tiny"].items())))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def found_kinds(result: dict) -> list[str]:
    return list(next(iter(result["tiny"].values())))


if __name__ == "__main__":
    main()
