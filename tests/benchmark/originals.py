# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Seconds per step of the original training scripts of Diffusion-DPO and InPO, which stay as their authors wrote them.

    git clone https://github.com/SalesforceAIResearch/DiffusionDPO
    git clone https://github.com/JaydenLyh/InPO
    python -m tests.benchmark.originals --diffusion_dpo DiffusionDPO --inpo InPO --python old/bin/python

`old/bin/python` is of an environment with what their requirements pin. These versions belong together on Python 3.11:

    torch==2.0.1 torchvision==0.15.2 diffusers==0.20.0 transformers==4.30.2 accelerate==0.20.2 huggingface_hub==0.23.5
    datasets==2.21.0 pyarrow==16.1.0 numpy==1.26.4 "setuptools<81" ftfy tensorboard

and on a GPU `xformers==0.0.22`, without which both scripts refuse to start. InPO pins `accelerate==0.34.2`, with which
both run as well. The wheel of this torch on PyPI is for CUDA 11.7 and has no kernels for Hopper or newer GPUs.

Neither script runs without a GPU, since xformers' attention does not. There, or with `--attention sdpa`, a few lines
that run before the script let it go on with diffusers' default, torch's own attention. The result says which of
the two was measured.

A pipeline with random weights and a handful of image pairs are written first. A script then trains for A and for B
steps, and the difference of the two wall times over (B - A) is reported, so that imports, loading and saving drop out.
A step of InPO takes as long as its random timestep is large: it calls the UNet 1 to 10 times, 6.4 times on average,
before it trains. So B - A must be large for InPO: with 50 that alone is a standard error of up to 4 percent.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


# ----- what runs in the other environment, with its old versions -----

# Prints what the environment has. Nothing but xformers may be missing.
VERSIONS = """
import importlib.metadata, json, platform
import accelerate, datasets, diffusers, torch, torchvision, transformers, tensorboard

found = {"python": platform.python_version()}
for name in ("torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "xformers"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
found["device_name"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print("VERSIONS", json.dumps(found))
"""

# Writes the pipeline and the dataset, the latter in the two forms from which the two scripts load it.
INPUTS = """
import io, json, os, string, sys
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

model, resolution, pairs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
rng = np.random.default_rng(0)

# Letters are tokens, and so is "a" as a word.
os.makedirs("tokenizer", exist_ok=True)
letters = list(string.ascii_lowercase + string.digits)
tokens = [*letters, *(letter + "</w>" for letter in letters), "an</w>", "<|startoftext|>", "<|endoftext|>"]
with open("tokenizer/vocab.json", "w") as file:
    json.dump({token: index for index, token in enumerate(tokens)}, file)
with open("tokenizer/merges.txt", "w") as file:
    file.write("#version: 0.2\\na n</w>\\n")
tokenizer = CLIPTokenizer("tokenizer/vocab.json", "tokenizer/merges.txt", model_max_length=77)

if model == "sd15":
    text_config = dict(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    unet_config = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae_config = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
else:
    text_config = dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    unet_config = dict(
        sample_size=8,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae_config = dict(block_out_channels=(16, 32, 48), layers_per_block=1, sample_size=32, norm_num_groups=8)
levels = len(vae_config["block_out_channels"])
unet = UNet2DConditionModel(**unet_config)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **vae_config,
    ),
    text_encoder=CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **text_config)),
    tokenizer=tokenizer,
    unet=unet,
    scheduler=PNDMScheduler(  # Stable Diffusion's; the scripts read the betas and the offset from its config
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipeline.scheduler.register_to_config(clip_sample=False)  # not an argument of this class, as in Stable Diffusion
pipeline.save_pretrained("base_pipeline", safe_serialization=True)


def picture():
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((resolution, resolution), Image.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


dataset = Dataset.from_dict(
    {
        "jpg_0": [picture() for _ in range(pairs)],
        "jpg_1": [picture() for _ in range(pairs)],
        "label_0": [float(index % 2) for index in range(pairs)],
        "caption": ["an image number %d" % index for index in range(pairs)],
    }
)
os.makedirs("pickapic_v2/data", exist_ok=True)
dataset.to_parquet("pickapic_v2/data/train-00000-of-00001.parquet")  # what `load_dataset` finds in a folder
DatasetDict({"train": dataset}).save_to_disk("dataset/pickapic_v2")  # the folder that InPO's script has in its code
print("PARAMETERS", sum(parameter.numel() for parameter in unet.parameters()))
"""

# Runs a script where xformers cannot be used. The scripts only ask whether it is there and switch it on.
WITHOUT_XFORMERS = """
import os, runpy, sys, types
import diffusers.utils.import_utils
from diffusers import ModelMixin

diffusers.utils.import_utils._xformers_available = True
sys.modules["xformers"] = types.ModuleType("xformers")
sys.modules["xformers"].__version__ = "0.0.22"
ModelMixin.enable_xformers_memory_efficient_attention = lambda self, attention_op=None: None
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ScriptError(RuntimeError):
    """A command in the other environment failed."""


def run(command: list[str], work_dir: Path, device: str) -> str:
    """Run a command offline in a folder and return all that it printed."""
    home = str(work_dir.resolve() / "home")
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {f"{library}_OFFLINE": "1" for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    variables |= {"HF_HOME": home, "PYTHONNOUSERSITE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=work_dir, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        shown = " ".join("<code>" if "\n" in part else part for part in command)
        raise ScriptError(f"`{shown}` failed with exit status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def versions(python: str, work_dir: Path, device: str) -> dict:
    """What the environment of an interpreter has."""
    printed = run([python, "-c", VERSIONS], work_dir, device)
    return json.loads(re.search(r"^VERSIONS (.*)$", printed, re.MULTILINE)[1])


def command_of(script: Path, args: argparse.Namespace, attention: str) -> list[str]:
    """The command that trains with a script, but for the number of steps."""
    command = [args.python] if attention == "xformers" else [args.python, "-c", WITHOUT_XFORMERS]
    return [
        *command,
        str(script),
        # Relative names: the scripts look for words as "turbo" in the one and for "pickapic" in the other.
        "--pretrained_model_name_or_path=base_pipeline",
        "--dataset_name=pickapic_v2",
        "--output_dir=output",
        f"--resolution={args.resolution}",
        f"--train_batch_size={args.batch_size}",
        f"--gradient_accumulation_steps={args.gradient_accumulation_steps}",
        f"--dataloader_num_workers={args.dataloader_num_workers}",
        f"--mixed_precision={args.mixed_precision}",
        "--checkpointing_steps=1000000000",
        f"--seed={args.seed}",
    ]


def wall_time(command: list[str], steps: int, work_dir: Path, device: str) -> float:
    """Seconds of a run of so many steps, which has seen each of them."""
    start = time.perf_counter()
    printed = run([*command, f"--max_train_steps={steps}"], work_dir, device)
    seconds = time.perf_counter() - start
    shutil.rmtree(work_dir / "output")  # else the next run would resume, and weights fill the disk
    if not re.search(rf"Steps: 100%\|[^|]*\| {steps}/{steps} ", printed):
        raise ScriptError(f"`{command[-1]}` ended without error, but not after {steps} steps:\n{printed[-3000:]}")
    return seconds


def measure(script: Path, args: argparse.Namespace, attention: str, work_dir: Path) -> dict:
    """Seconds per step of a script. The first run, which fills caches, does not count."""
    command = command_of(script, args, attention)
    few, many = args.steps
    walls = {few: [], many: []}
    wall_time(command, few, work_dir, args.device)
    for _ in range(args.repeats):  # few, many, few, many: a slow spell of the machine meets both
        for steps in walls:
            walls[steps].append(wall_time(command, steps, work_dir, args.device))
    seconds = (min(walls[many]) - min(walls[few])) / (many - few)
    if seconds <= 0:
        raise ScriptError(f"{many} steps were not slower than {few}: {walls}. Take `--steps` further apart.")
    pairs = args.batch_size * args.gradient_accumulation_steps
    return {
        "seconds_per_step": seconds,
        "pairs_per_step": pairs,
        "pairs_per_second": pairs / seconds,
        "wall_seconds": {str(steps): values for steps, values in walls.items()},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion_dpo", type=Path, help="Checkout of SalesforceAIResearch/DiffusionDPO.")
    parser.add_argument("--inpo", type=Path, help="Checkout of JaydenLyh/InPO.")
    parser.add_argument("--python", required=True, help="Interpreter of the environment in which they run.")
    parser.add_argument("--model", choices=["tiny", "sd15"], default="tiny", help="Sizes of the random pipeline.")
    parser.add_argument("--steps", type=int, nargs=2, default=[5, 55], metavar=("A", "B"), help="Lengths of the runs.")
    parser.add_argument("--repeats", type=int, default=1, help="Runs of each length; the fastest counts.")
    parser.add_argument("--resolution", type=int, help="Side of the images; by default 32 for tiny, 512 for sd15.")
    parser.add_argument("--batch_size", type=int, default=1, help="Pairs of a forward pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Forward passes of a step.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Passed on.")
    parser.add_argument("--pairs", type=int, help="Pairs in the dataset; by default a multiple of those of a step.")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="By default the GPU, if there is one.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="By default fp16 on a GPU, as theirs; no on the CPU."
    )
    parser.add_argument(
        "--attention", choices=["xformers", "sdpa"], help="By default xformers, unless the environment cannot use it."
    )
    parser.add_argument("--seed", type=int, default=0, help="Passed on.")
    parser.add_argument("--work_dir", type=Path, help="Where to put the temporary folder.")
    parser.add_argument("--output", type=Path, help="File for the result.")
    args = parser.parse_args()
    if args.diffusion_dpo is None and args.inpo is None:
        parser.error("name a checkout with --diffusion_dpo or --inpo")
    if not 0 < args.steps[0] < args.steps[1]:
        parser.error("--steps takes two numbers, the smaller one first")
    for checkout in (args.diffusion_dpo, args.inpo):
        if checkout is not None and not (checkout / "train.py").is_file():
            parser.error(f"there is no train.py in {checkout}")
    found = shutil.which(args.python)
    if found is None:
        parser.error(f"{args.python} cannot be run")
    args.python = os.path.abspath(found)  # not resolved: the link is what makes it an environment's
    args.resolution = args.resolution or (512 if args.model == "sd15" else 32)
    args.pairs = args.pairs or 16 * args.batch_size * args.gradient_accumulation_steps
    return args


def benchmark(args: argparse.Namespace, work_dir: Path) -> dict:
    """Measure the scripts that were named."""
    environment = versions(args.python, work_dir, args.device)
    has_gpu = environment["device_name"] is not None
    if args.device == "cuda" and not has_gpu:
        raise ScriptError("The environment sees no GPU. `--device cpu` does without.")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    args.mixed_precision = args.mixed_precision or ("fp16" if args.device == "cuda" else "no")
    can_xformers = args.device == "cuda" and environment["xformers"] is not None
    attention = args.attention or ("xformers" if can_xformers else "sdpa")
    if attention == "xformers" and not can_xformers:
        raise ScriptError(
            "`--attention xformers` needs a GPU, and xformers in the environment. Leave it out for sdpa."
        )
    printed = run(
        [args.python, "-c", INPUTS, args.model, str(args.resolution), str(args.pairs)], work_dir, args.device
    )
    names = ("model", "steps", "repeats", "resolution", "batch_size", "gradient_accumulation_steps", "pairs", "seed")
    names += ("device", "mixed_precision", "dataloader_num_workers")
    result = {
        "environment": environment,
        "settings": {name: getattr(args, name) for name in names} | {"attention": attention},
        "unet_parameters": int(re.search(r"^PARAMETERS (\d+)$", printed, re.MULTILINE)[1]),
        "results": {},
    }
    for name in ("diffusion_dpo", "inpo"):
        if (checkout := getattr(args, name)) is not None:
            measured = measure((checkout / "train.py").resolve(), args, attention, work_dir)
            result["results"][name] = measured
            print(
                f"{name}: {measured['seconds_per_step']:.4f} s per step, {measured['pairs_per_second']:.2f} pairs/s",
                flush=True,
            )
    return result


def main():
    args = parse_args()
    if args.work_dir is not None:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="originals_", dir=args.work_dir) as work_dir:
            result = benchmark(args, Path(work_dir))
    except ScriptError as error:
        raise SystemExit(str(error)) from None
    printed = json.dumps(result, indent=2)
    print(printed)
    if args.output is not None:
        args.output.write_text(printed + "\n")


if __name__ == "__main__":
    main()
