# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Make a flow base model of the quickstart: a tiny Stable Diffusion 3 pipeline whose transformer is trained from scratch.

    python -m examples.tiny_pipelines.make_flow_pipeline --output_dir flow_base_pipeline
    python -m examples.tiny_pipelines.make_flow_pipeline --world paintings --output_dir flow_painting_base

It learns the same small worlds as the pipelines of `make_base_pipeline.py`, and takes the VAE of the one that comes with the
quickstart. The three text encoders are random and stay so: their states tell words apart, and the transformer learns what
they mean. So each prompt is encoded once, and words that are in no training prompt are as distinct as the others. The same
seed gives the same weights on one machine.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import SIZE

from .make_base_pipeline import WORLDS, latents_of, make_tokenizer, measure, pixels_of


ENOUGH = {"scenes": (20_000, 2500), "paintings": (30_000, 4500)}  # training images and steps
CLIP_LENGTH = 10  # tokens; the attributes of a painting reach beyond it, and T5 reads all of them
T5_LENGTH = MODELS["flow"].conditions["max_sequence_length"]
CLIP_WIDTH = 32
T5_WIDTH = 2 * CLIP_WIDTH  # the states of the two CLIP encoders side by side are as wide as those of T5


# ----- the parts -----


def load_vae(world: str) -> AutoencoderKL:
    """The VAE of the world's UNet pipeline. A Stable Diffusion 3 pipeline also shifts latents: by nothing here."""
    folder = shipped(getattr(MODELS["unet"], world))
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    return vae.requires_grad_(False)


def make_t5_tokenizer(words: list[str]) -> T5Tokenizer:
    """A T5 tokenizer in which each of the words is one token, and all else unknown."""
    tokens = ["▁", *(word if word == "," else f"▁{word}" for word in words)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((token, -1.0) for token in tokens)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)
    assert all(tokenizer.unk_token_id not in tokenizer(word).input_ids for word in words)
    return tokenizer


def make_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_transformer(num_layers: int, num_heads: int) -> SD3Transformer2DModel:
    """Latents of 8x8 in patches of 2x2."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=num_heads,
        caption_projection_dim=32 * num_heads,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=SIZE // 8,
    )


def make_pipeline(world: str, num_layers: int, num_heads: int) -> StableDiffusion3Pipeline:
    words = [*WORLDS[world].words, *WORLDS[world].silent_words]
    tokenizer, t5_tokenizer = make_tokenizer(words, CLIP_LENGTH), make_t5_tokenizer(words)
    return StableDiffusion3Pipeline(
        vae=load_vae(world),
        text_encoder=make_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_clip_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5_encoder(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
        transformer=make_transformer(num_layers, num_heads),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


# ----- training -----


@torch.no_grad()
def encode(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of all encoders, `(prompts, CLIP_LENGTH + T5_LENGTH, T5_WIDTH)`, and the pooled ones of the two CLIPs."""
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return states, pooled


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    prompts: list[str],
    num_steps: int,
    batch_size: int,
    seed: int,
):
    """Fit the transformer to predict the velocity from the image to the noise; keep the moving average of its weights."""
    transformer = pipeline.transformer
    distinct = ["", *sorted(set(prompts))]
    states, pooled = encode(pipeline, distinct)
    rows_of = {prompt: row for row, prompt in enumerate(distinct)}
    prompt_rows = np.array([rows_of[prompt] for prompt in prompts])

    parameters = list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps, pct_start=0.05)
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        rows = rng.integers(len(latents), size=batch_size)
        dropped = rng.random(batch_size) < 0.1  # for classifier-free guidance
        conditions = torch.from_numpy(np.where(dropped, 0, prompt_rows[rows]))
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator)
        sigmas = compute_density_for_timestep_sampling(
            "logit_normal", batch_size, logit_mean=0.0, logit_std=1.0, generator=generator
        )
        levels = sigmas[:, None, None, None]
        noisy = (1 - levels) * latents[rows] + levels * noise
        velocity = transformer(
            noisy,
            timestep=1000 * sigmas,
            encoder_hidden_states=states[conditions],
            pooled_projections=pooled[conditions],
        ).sample
        loss = (velocity - (noise - latents[rows])).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(parameters)
        if step % 100 == 0 or step == num_steps - 1:
            print(f"transformer step {step:5d}  loss {loss.item():.4f}", flush=True)
    average.copy_to(parameters)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=ENOUGH, default="scenes", help="The world to learn.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the training data.")
    parser.add_argument("--num_scenes", type=int, help="Number of training images; by default what the world needs.")
    parser.add_argument(
        "--num_steps", type=int, help="Training steps, with 64 images each; by default what the world needs."
    )
    parser.add_argument("--num_layers", type=int, default=4, help="Layers of the transformer.")
    parser.add_argument("--num_heads", type=int, default=4, help="Attention heads of the transformer, 32 wide each.")
    parser.add_argument("--num_samples", type=int, default=768, help="Images to score at the end; 0 for none.")
    args = parser.parse_args()
    world = WORLDS[args.world]

    torch.manual_seed(args.seed)
    pipeline = make_pipeline(args.world, args.num_layers, args.num_heads)
    rng = np.random.default_rng(args.seed)
    num_scenes, num_steps = (
        given or needed for given, needed in zip((args.num_scenes, args.num_steps), ENOUGH[args.world], strict=True)
    )
    scenes = [world.sample(rng) for _ in range(num_scenes)]
    latents = latents_of(pipeline.vae, pixels_of(scenes, world.render))
    train_transformer(pipeline, latents, [scene.prompt for scene in scenes], num_steps, 64, args.seed)

    # Half precision halves the folder. diffusers reads it back in single precision, transformers would not.
    pipeline.to(torch.float16)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        encoder.float()
    pipeline.save_pretrained(args.output_dir)
    if args.num_samples:
        pipeline = StableDiffusion3Pipeline.from_pretrained(args.output_dir)  # measured as others will load it
        for num_inference_steps in (10, 16):
            settings = {"num_inference_steps": num_inference_steps, "max_sequence_length": T5_LENGTH}
            print(num_inference_steps, measure(pipeline, world, args.num_samples, args.seed + 1, **settings))


if __name__ == "__main__":
    main()
