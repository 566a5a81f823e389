# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Trains Diffusion-DPO and IAPO on the embedded world of coloured shapes, and compares what they draw.

```bash
trl-diffusion quickstart --output_dir quickstart
```

Every pair of the world is labelled by its shape A; in 46 % of the pairs shape B, drawn better in the rejected image,
contradicts the label. Diffusion-DPO follows the label over the whole image. IAPO takes the contradicting B out of the
loss. How often each model then draws A and B without a defect, and what the prompt names, is counted by the world's oracle.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from trl import TrlParser


@dataclass
class QuickstartArguments:
    """
    Arguments of `trl-diffusion quickstart`.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"quickstart"`):
            Where `results.json`, `samples.png` and `report.md` go.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs, of the training and of the samples.
        num_pairs (`int`, *optional*, defaults to `2048`):
            Preference pairs to train on.
        max_steps (`int`, *optional*, defaults to `110`):
            Optimizer steps of each training.
        num_samples (`int`, *optional*, defaults to `1024`):
            Images that each model draws.
    """

    output_dir: str = field(
        default="quickstart", metadata={"help": "Where `results.json`, `samples.png` and `report.md` go."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the pairs, of the training and of the samples."})
    num_pairs: int = field(default=2048, metadata={"help": "Preference pairs to train on."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=1024, metadata={"help": "Images that each model draws."})


# name: what the pictures call it, what InstanceDPOConfig is given
ARMS = {
    "dpo": ("Diffusion-DPO", {"w_neg": 1.0}),
    "iapo": ("IAPO", {"w_neg": 0.0}),
    "iapo_covering": ("IAPO, covering", {"w_neg": 0.0, "mask_overlap": "covering"}),
}
TRAINING = {
    "beta": 2000.0,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 32,
}
SAMPLING = {"num_inference_steps": 10, "guidance_scale": 2.0, "batch_size": 256}
PACKAGES = ("trl-diffusion", "trl", "transformers", "diffusers", "torch")


def main(args: QuickstartArguments) -> None:
    from trl_diffusion.quickstart.world import evaluation_prompts
    from trl_diffusion.visualization import image_grid

    start = time.perf_counter()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"Drawing {args.num_samples} images with the base and with {len(ARMS)} models that are trained first.",
        flush=True,
    )
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        runs = {name: pool.submit(run_arm, name, args) for name in ("base", *ARMS)}
        scores, pictures = zip(*(run.result() for run in runs.values()), strict=True)

    prompts = evaluation_prompts(args.num_samples, seed=args.seed)[: len(pictures[0])]
    columns = ["base", *(title for title, _ in ARMS.values())]
    grid = image_grid([list(row) for row in zip(*pictures, strict=True)], columns, prompts, size=160)
    grid.save(folder / "samples.png")
    results = dict(zip(runs, scores, strict=True)) | {
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {package: version(package) for package in PACKAGES},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "report.md").write_text(report(results, args))
    print(f"Done in {results['seconds']:.0f} seconds: look at {folder / 'samples.png'} and {folder / 'report.md'}.")


def run_arm(name: str, args: QuickstartArguments) -> tuple[dict[str, float], list]:
    """Trains the base as an arm does (or not), draws, and counts: the scores and the first images."""
    import torch

    from trl_diffusion.quickstart.world import evaluation_prompts, preference_dataset

    torch.set_num_threads(1)
    start = time.perf_counter()
    pipeline = load_base()
    if name in ARMS:
        train(pipeline, preference_dataset(args.num_pairs, seed=args.seed), args, ARMS[name][1])
    trained = time.perf_counter()
    prompts = evaluation_prompts(args.num_samples, seed=args.seed)
    images = draw(pipeline, prompts, args.seed)
    scores = score(images, prompts)
    shares = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if key != "n")
    print(
        f"{name}: trained in {trained - start:.0f} s, drawn in {time.perf_counter() - trained:.0f} s: {shares}",
        flush=True,
    )
    return scores, images[:8]


def load_base():
    """The Stable Diffusion pipeline that the package carries, see `quickstart/make_base_pipeline.py`."""
    import torch
    from diffusers import StableDiffusionPipeline

    folder = resources.files("trl_diffusion").joinpath("quickstart/base_pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def train(pipeline, pairs, args: QuickstartArguments, settings: dict) -> None:
    """Trains all weights of the pipeline's denoiser, in place."""
    from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer

    trainer = InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(
            output_dir=args.output_dir,
            seed=args.seed,
            max_steps=args.max_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=20,
            activation_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=False,
            **TRAINING,
            **settings,
        ),
        train_dataset=pairs,
    )
    trainer.train()


def draw(pipeline, prompts: list[str], seed: int) -> list:
    """The same prompts from the same noise for every model."""
    from trl_diffusion import sample_images

    pipeline.unet.eval()
    return sample_images(pipeline, prompts, seed=seed, **SAMPLING)


def score(images: list, prompts: list[str]) -> dict[str, float]:
    """Shares of the images in which the oracle finds A and B clean, and as the prompt names them."""
    from trl_diffusion.quickstart.world import inspect_image

    findings = [inspect_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {}
    for what in ("clean", "match"):
        for index, shape in enumerate("ab"):
            shares[f"{what}_{shape}"] = sum(getattr(found[index], what) for found in findings) / len(findings)
    return shares | {"n": len(findings)}


def report(results: dict, args: QuickstartArguments) -> str:
    """A page of Markdown on what was run and what came out."""
    rows = [
        f"| {title} | {r['clean_a']:.3f} | {r['clean_b']:.3f} | {r['match_a']:.3f} | {r['match_b']:.3f} |"
        for title, r in (("base", results["base"]), *((title, results[name]) for name, (title, _) in ARMS.items()))
    ]
    error = 0.5 / args.num_samples**0.5
    table = "\n".join(["| model | A clean | B clean | A matches | B matches |", "|---|---|---|---|---|", *rows])
    return f"""# Quickstart: does it help to know which object contradicts the label?

A tiny Stable Diffusion pipeline draws two shapes, A (large, left) and B (smaller, right), each with a bite out of its
outline about half of the time. {args.num_pairs} pairs of scenes say which of two images is better. Shape A decides: it is
whole in the chosen image and bitten in the rejected one. In 46 % of the pairs shape B is whole in the *rejected* image, and
the label is wrong about it.

{table}

Shares of {args.num_samples} images per model, all drawn from the same prompts and noise (standard error at most {error:.3f}).
*Clean*: drawn without a bite. *Matches*: colour and kind are those that the prompt names; a method that breaks images
shows here.

- **Diffusion-DPO** (`w_neg=1`) follows the label everywhere, so what it says about B nearly cancels out.
- **IAPO** (`w_neg=0`) lowers the weight of the contradicting B. With two instances an image, the paper's mean over
  instances leaves it one half.
- **IAPO, covering** (`mask_overlap="covering"`, ours) averages over the instances that cover a position, which takes the
  contradicting B out altogether.

![The same noise through every model](samples.png)

Seed {results["seed"]}, {args.max_steps} optimizer steps of {TRAINING["per_device_train_batch_size"]} pairs, learning rate
{TRAINING["learning_rate"]}, beta {TRAINING["beta"]:.0f}, all weights of the UNet; {results["seconds"]:.0f} seconds in all.
{", ".join(f"{package} {number}" for package, number in results["versions"].items())}.
"""


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser((QuickstartArguments,), prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
