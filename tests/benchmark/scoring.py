# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What scores cost beside their model's forward.

    python -m tests.benchmark.scoring --device cpu|cuda [--scorers pickscore hpsv2 aesthetic] [--output FILE.json]

Run it from the repository's root. Models have their true size and random weights in float32. A scorer starts from files of
images and from prompts; the floor is its model's forward on what was prepared before, at the same batch, and nothing else.
Both are taken in turns in one process.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from tests.benchmark.annotation import photograph
from trl_diffusion.batching import batched
from trl_diffusion.metrics.aesthetic import AestheticScorer, aesthetic_head
from trl_diffusion.metrics.clip import CosineScorer
from trl_diffusion.metrics.hpsv2 import HPSv2Scorer
from trl_diffusion.metrics.scorer import Scorer
from trl_diffusion.revisions import resolve_revision


BYTES = [f"{byte}</w>" for byte in sorted(ByteLevel.alphabet())]  # a token a letter, if letters stand alone
PROMPT = "a bc d ef g hi j kl m no p qr s tu v wx y z" * 2  # about as many tokens as prompts have


class CosineBenchmark(CosineScorer):
    """PickScore and the CLIP score."""

    name = "pickscore"


class HPSv2Benchmark(HPSv2Scorer):
    """HPS v2 with a model that comes from no file."""

    __init__ = CosineScorer.__init__


SCORERS = ["pickscore", "hpsv2", "aesthetic"]


# Widths, layers and heads of the towers of CLIP ViT-L/14 and ViT-H/14, and of a toy
LARGE = (1024, 24, 16), (768, 12, 12)
HUGE = (1280, 32, 16), (1024, 24, 16)
TOY = (32, 2, 2), (32, 2, 2)


def clip(
    towers: tuple[tuple[int, int, int], tuple[int, int, int]], width: int, activation: str, device: str
) -> CLIPModel:
    """A CLIP with patches of 14 pixels and 49408 tokens, from widths, layers and heads of its towers: images, text."""
    settings = [
        {
            "hidden_size": size,
            "intermediate_size": 4 * size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": width,
        }
        for size, layers, heads in towers
    ]
    config = CLIPConfig(
        vision_config={**settings[0], "image_size": 224, "patch_size": 14},
        text_config=settings[1],
        projection_dim=width,
    )
    with no_init_weights(), torch.device(device):  # weights are drawn where they will be
        model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    return model


def make_scorer(name: str, folder: Path, device: str, is_tiny: bool = False) -> Scorer:
    """A scorer of true size, or a toy; its files are written to the folder."""
    others = [f"<{index}>" for index in range(49406 - len(BYTES))]
    tokens = [*BYTES, *others, "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    if name == "aesthetic":
        model = clip(TOY if is_tiny else LARGE, 768, "quick_gelu", device)
        model.save_pretrained(folder)
        torch.save(aesthetic_head(768).state_dict(), folder / "head.pth")
        return AestheticScorer(folder / "head.pth", str(folder), device)
    model = clip(TOY if is_tiny else HUGE, 1024, "gelu", device)
    model.config.save_pretrained(folder)
    return {"pickscore": CosineBenchmark, "hpsv2": HPSv2Benchmark}[name](
        model, str(folder), resolve_revision(str(folder)), device
    )


def forward(scorer: Scorer, files: list[Path], prompts: list[str]) -> Callable[[], torch.Tensor]:
    """The model's forward on one batch that lies ready on the device."""
    pixels = torch.stack([scorer.prepare(Image.open(file)) for file in files]).to(scorer.device)
    if isinstance(scorer, AestheticScorer):
        return lambda: scorer.head(scorer.clip.get_image_features(pixel_values=pixels).pooler_output)
    tokens = scorer.tokenize(prompts).to(scorer.device)
    return lambda: scorer.model(pixel_values=pixels, **tokens).logits_per_image


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Images a second of the scorer and of the floor, and their ratio in time; raw seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [folder / f"{index}.png" for index in range(args.num_images)]
        for index, file in enumerate(files):
            if index < 64:
                Image.open(io.BytesIO(photograph(index, args.size))).save(file)
            else:  # nothing is cached by content
                shutil.copy(files[index % 64], file)
        prompts = [PROMPT] * len(files)
        start = time.perf_counter()
        scorer = make_scorer(name, folder, args.device, args.tiny)
        made = time.perf_counter() - start
        batches = [forward(scorer, batch, prompts[: len(batch)]) for batch in batched(files, args.batch_size)]

        def floor() -> None:
            with torch.inference_mode():
                for batch in batches:
                    batch().tolist()  # waits for the GPU, as scores do

        def score() -> None:
            scorer.score(files, prompts, batch_size=args.batch_size)

        for _ in range(args.warmup):
            floor()
            score()
        seconds = {"score": [], "floor": []}
        for _ in range(args.rounds):
            for what, go in (("floor", floor), ("score", score)):
                start = time.perf_counter()
                go()
                seconds[what].append(time.perf_counter() - start)
        start = time.perf_counter()
        for file in files:
            scorer.prepare(Image.open(file))
        prepared = time.perf_counter() - start
    return {
        "scorer": name,
        "images_per_second": {what: len(files) / statistics.median(rounds) for what, rounds in seconds.items()},
        "time_to_floor": statistics.median(
            score / floor for score, floor in zip(seconds["score"], seconds["floor"], strict=True)
        ),
        "milliseconds_to_prepare_an_image": 1000 * prepared / len(files),
        "seconds_to_make": made,
        "seconds": seconds,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True, help="Where to run.")
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=SCORERS, help="Which to time.")
    parser.add_argument("--size", type=int, default=512, help="Side of the images in pixels.")
    parser.add_argument("--batch_size", type=int, help="Images at a time; 16 on a GPU, else 2.")
    parser.add_argument("--num_images", type=int, help="Images in a round; 512 on a GPU, else 4.")
    parser.add_argument("--rounds", type=int, help="Rounds to measure; 3 on a GPU, else 1.")
    parser.add_argument("--warmup", type=int, help="Rounds before these; 1 on a GPU, else 0.")
    parser.add_argument("--tiny", action="store_true", help="Toys in place of models of true size.")
    parser.add_argument("--output", type=Path, help="JSON file for all raw times.")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    for name, (gpu, cpu) in {
        "batch_size": (16, 2),
        "num_images": (512, 4),
        "rounds": (3, 1),
        "warmup": (1, 0),
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    return args


def main() -> None:
    args = parse_args()
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("size", "batch_size", "num_images", "rounds", "warmup")},
        "results": [measure(name, args) for name in args.scorers],
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
