# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "diffusers",
#     "numpy",
#     "torch",
#     "transformers",
# ]
# ///

"""Make a base model of the quickstart: a Stable Diffusion pipeline of 2.7 million parameters, trained from scratch.

    python examples/tiny_pipelines/make_base_pipeline.py --output_dir base_pipeline
    python examples/tiny_pipelines/make_base_pipeline.py --world paintings --output_dir painting_base
    python examples/tiny_pipelines/make_base_pipeline.py --world crowds --output_dir crowd_pipeline

It learns one of the small worlds, `quickstart/world.py`, `quickstart/paintings.py` or `quickstart/crowds.py`, in about half an
hour on one core of a CPU. Half of the shapes of scenes and crowds are defective, and each quality of paintings is negative half
of the time. No prompt says which, so the model generates clean shapes or good qualities about half of the time (two thirds in
crowds), and preference training can improve on that. The same seed gives the same weights on one machine.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trl_diffusion.quickstart import crowds, iapo, paintings
from trl_diffusion.quickstart.world import COLORS, KINDS, SIZE, evaluation_prompts, render, sample_scene


# ----- the worlds -----


@dataclass(frozen=True)
class World:
    """What the base model of a world needs to know.

    Args:
        words (`list[str]`):
            The words of its prompts.
        silent_words (`list[str]`):
            Words that are tokens too, although they are in no prompt that the base is trained on.
        max_length (`int`):
            Number of tokens of the longest prompt.
        sample (`Callable`):
            Samples a scene, which has a `prompt`, from a `np.random.Generator`.
        render (`Callable`):
            Makes an image of a scene.
        score (`Callable`):
            Scores images, given their prompts.
        num_scenes (`int`), num_vae_steps (`int`), num_steps (`int`):
            How much training is enough.
    """

    words: list[str]
    silent_words: list[str]
    max_length: int
    sample: Callable
    render: Callable
    score: Callable
    num_scenes: int
    num_vae_steps: int
    num_steps: int


def score_paintings(images: list, prompts: list[str]) -> dict[str, float]:
    """How often images match their prompt, how many negatives they have, and how often each of these."""
    findings = [paintings.inspect_painting(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        "match": float(np.mean([finding.match for finding in findings])),
        "negatives": float(np.mean([len(finding.negative_attributes) for finding in findings])),
    } | {
        negative: float(np.mean([attribute in finding.negative_attributes for finding in findings]))
        for attribute, (_, negative) in paintings.ATTRIBUTES.items()
    }


WORLDS = {
    "scenes": World(
        words=["a", "and", *COLORS, *KINDS],
        silent_words=[],
        max_length=10,
        sample=sample_scene,
        render=render,
        score=iapo.score,
        num_scenes=30_000,
        num_vae_steps=2000,
        num_steps=4500,
    ),
    "paintings": World(
        words=["a", *COLORS, *KINDS],
        silent_words=[",", *(word for pair in paintings.ATTRIBUTES.values() for word in pair)],
        max_length=16,
        sample=paintings.sample_painting,
        render=paintings.render,
        score=score_paintings,
        num_scenes=20_000,
        num_vae_steps=1500,
        num_steps=4000,
    ),
    "crowds": World(
        words=["a", ",", "and", *COLORS, *KINDS],
        silent_words=[],
        max_length=13,
        sample=crowds.sample_crowd,
        render=crowds.render,
        score=crowds.score,
        num_scenes=40_000,
        num_vae_steps=2000,
        num_steps=6000,
    ),
}


# ----- the parts -----


def make_tokenizer(words: list[str], max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of the words is one token."""
    # Byte-pair merges build each word letter by letter from its start. Longer words first: "green" must have become
    # "gr" + ... before the merge of "r" and "e", which starts "red", can touch it.
    words = sorted(words, key=len, reverse=True)
    letters, merges = set(), []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        letters.update(symbols)
        while len(symbols) > 1:
            first, second, *rest = symbols
            if rest[:2] == [first, second]:  # "vivid": a merge takes place wherever it can
                rest = [first + second, *rest[2:]]
            merges.append((first, second))
            symbols = [first + second, *rest]
    merges = list(dict.fromkeys(merges))
    tokens = ["<|startoftext|>", "<|endoftext|>", *sorted(letters), *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)  # start, word, end
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderKL:
    """32x32x3 to 8x8x4 and back, 0.4 M parameters."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def make_unet() -> UNet2DConditionModel:
    """2.2 M parameters. The prompt enters at 4x4 only: attention at 8x8 costs more time than it is worth."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


# ----- training -----


def pixels_of(scenes: list, render: Callable) -> torch.Tensor:
    """Renderings in [-1, 1], `(scenes, 3, SIZE, SIZE)`."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, pixels: torch.Tensor, num_steps: int, batch_size: int, rng: np.random.Generator):
    """Fit the autoencoder, then give its latents a mean of 0 in each channel and a variance of 1 overall."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.1)
    for step in range(num_steps):
        batch = pixels[rng.integers(len(pixels), size=batch_size)]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        loss = error + 1e-5 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == num_steps - 1:
            print(f"vae  step {step:5d}  squared error {error.item():.5f}", flush=True)

    # Diffusion starts from noise around zero. Stable Diffusion has a scale for its latents but no shift, so the shift
    # goes into the biases of the two 1x1 convolutions before and after the latents.
    with torch.no_grad():
        means = vae.encode(pixels[:2048]).latent_dist.mean
        shift = means.mean((0, 2, 3))
        vae.quant_conv.bias[:4] -= shift
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
        # The denoiser learns from the means of the posterior, but trainers encode with samples from it. As in Stable
        # Diffusion, the posterior is made so narrow that the two are the same.
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -20  # the logarithm of the variance
    vae.register_to_config(scaling_factor=1 / (means - shift[:, None, None]).std().item())


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    means = [vae.encode(batch).latent_dist.mean for batch in pixels.split(256)]
    return torch.cat(means) * vae.config.scaling_factor


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    no_prompt: torch.Tensor,
    num_steps: int,
    batch_size: int,
    rng: np.random.Generator,
):
    """Fit the UNet and the text encoder together to predict the noise; keep the moving average of their weights."""
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=num_steps, pct_start=0.05)
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True)
    for step in range(num_steps):
        rows = rng.integers(len(latents), size=batch_size)
        dropped = torch.from_numpy(rng.random(batch_size) < 0.1)  # for classifier-free guidance
        prompts = torch.where(dropped[:, None], no_prompt, tokens[rows])
        noise = torch.from_numpy(rng.standard_normal((batch_size, *latents.shape[1:]), dtype=np.float32))
        timesteps = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=batch_size))
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        loss = (unet(noisy, timesteps, text_encoder(prompts)[0]).sample - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(parameters)
        if step % 200 == 0 or step == num_steps - 1:
            print(f"unet step {step:5d}  loss {loss.item():.4f}", flush=True)
    average.copy_to(parameters)


@torch.no_grad()
def scale_silent_words(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, words: list[str], silent_words: list[str]
):
    """
    Scale the embeddings of words that are in no training prompt to a hundred times the mean length of the trained ones.

    The trained encoder writes what it knows about the prompt into every position. Compared with that, a random embedding of
    the usual length has hardly any effect, and an adapter that learns these words later could not tell them apart. With this
    length, the encoder's states for two such words differ as much as its states for red and blue.
    """
    table = text_encoder.get_input_embeddings().weight
    known, silent = (
        tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in each]) for each in (words, silent_words)
    )
    table[silent] *= 100 * table[known].norm(dim=1).mean() / table[silent].norm(dim=1, keepdim=True)


# ----- measuring -----


def measure(
    pipeline: DiffusionPipeline, world: World, num_samples: int, seed: int, guidance_scale: float = 2.0, **kwargs
) -> dict[str, float]:
    """Generate images with the settings of the quickstart, or with others of the pipeline's call, and score them."""
    settings = {"num_inference_steps": 10, "guidance_scale": guidance_scale, **kwargs}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    prompts, images = evaluation_prompts(num_samples, seed, world.sample), []
    for start in range(0, num_samples, 128):
        batch = prompts[start : start + 128]
        images += pipeline(batch, generator=generator, **settings).images
    return world.score(images, prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="scenes", help="The world to learn.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the training data.")
    parser.add_argument("--num_scenes", type=int, help="Number of training images; by default what the world needs.")
    parser.add_argument(
        "--num_vae_steps",
        type=int,
        help="Training steps of the VAE, with 32 images each; by default what the world needs.",
    )
    parser.add_argument(
        "--num_steps",
        type=int,
        help="Training steps of the UNet, with 64 images each; by default what the world needs.",
    )
    parser.add_argument("--num_samples", type=int, default=768, help="Images to score at the end; 0 for none.")
    args = parser.parse_args()
    world = WORLDS[args.world]
    num_scenes = args.num_scenes or world.num_scenes
    num_vae_steps = args.num_vae_steps or world.num_vae_steps
    num_steps = args.num_steps or world.num_steps

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    scenes = [world.sample(rng) for _ in range(num_scenes)]
    pixels = pixels_of(scenes, world.render)

    vae = make_vae()
    train_vae(vae, pixels, num_vae_steps, 32, rng)
    vae.requires_grad_(False)
    latents = latents_of(vae, pixels)
    print(f"vae  latents: std {latents.std():.3f}, largest {latents.abs().max():.1f}", flush=True)

    tokenizer = make_tokenizer([*world.words, *world.silent_words], world.max_length)
    scheduler, unet = make_scheduler(), make_unet()
    text_encoder = make_text_encoder(tokenizer)
    tokens = tokenizer(["", *(scene.prompt for scene in scenes)], padding="max_length", return_tensors="pt").input_ids
    train_denoiser(unet, text_encoder, scheduler, latents, tokens[1:], tokens[0], num_steps, 64, rng)
    if world.silent_words:
        scale_silent_words(text_encoder, tokenizer, world.words, world.silent_words)

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Half precision halves the folder. diffusers reads it back in single precision, transformers would not.
    pipeline.to(torch.float16)
    pipeline.text_encoder.float()
    pipeline.save_pretrained(args.output_dir)
    if args.num_samples:
        pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir)  # measured as others will load it
        print(measure(pipeline, world, args.num_samples, args.seed + 1))


if __name__ == "__main__":
    main()
