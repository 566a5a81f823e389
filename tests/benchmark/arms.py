# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The arms of the benchmark: this library's trainer in several settings, the floor, and three published scripts."""

import gc
import json
import tempfile
from argparse import Namespace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from tests.benchmark.measure import ForwardCounter, Rounds, Stopwatch, StopwatchCallback
from tests.benchmark.models import PROMPTS, build_pipeline, denoiser_of, image_pairs
from tests.benchmark.steps import Given, LoraScript, PairScript, PixelPairs, cast, floor_step, yardstick_step
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import Backbone, load_backbone
from trl_diffusion.trainer.row_randomness import RowRandomness


INVERSION = {"noise_source": "inversion", "inversion_steps": 10}
BY_POLICY = INVERSION | {"inversion_model": "policy"}
CACHED = {"precompute": True}
REF_CACHED = CACHED | {"precompute_ref_preds": True}
# name: whether a LoRA is trained, what InstanceDPOConfig is given
TRAINER_ARMS = {
    "full_live": (False, {}),
    "full_cached": (False, CACHED),
    "full_ref_cached": (False, REF_CACHED),
    "lora_live": (True, {}),
    "lora_cached": (True, CACHED),
    "lora_ref_cached": (True, REF_CACHED),
    "inversion_reference_live": (False, INVERSION),
    "inversion_reference_cached": (False, INVERSION | CACHED),
    "inversion_reference_cached_lora": (True, INVERSION | CACHED),
    "inversion_policy_live": (False, BY_POLICY),
    "inversion_policy_cached": (False, BY_POLICY | CACHED),
    "inversion_policy_cached_lora": (True, BY_POLICY | CACHED),
}
FLOOR_ARMS = {"floor": False, "floor_lora": True}  # name: whether a LoRA is trained
PAIR_SCRIPT_ARMS = {"diffusion_dpo": PairScript.random_noise, "inpo": PairScript.inversion}  # name: the noise
SCRIPT_ARMS = (*PAIR_SCRIPT_ARMS, "diffusers_lora")  # of UNets
LEARNING_RATE = 1e-8
ARMS = [*FLOOR_ARMS, *TRAINER_ARMS, *SCRIPT_ARMS]


def arms_of(model: str) -> list[str]:
    """The arms that a model has: the scripts know UNets alone."""
    is_unet = model in ("tiny", "sd15", "sdxl")
    return [arm for arm in ARMS if is_unet or arm not in SCRIPT_ARMS]


def release(device: str) -> None:
    """Frees what an arm used, also one that failed."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class TimedRandomness(RowRandomness):
    """Takes each row's timestep from its id, `NUMBER-TIMESTEP`, so that every arm trains on the same timesteps."""

    def timesteps(self, ids, size):
        yield torch.tensor([json.loads(row_id.split("-")[1]) for row_id in ids]), [self.key(row_id) for row_id in ids]


class TimedTrainer(InstanceDPOTrainer):
    def finish_init(self):
        super().finish_init()
        self.randomness = TimedRandomness(self.args.seed, self.process, self.args.prompt_dropout, self._moment)


class Benchmark:
    """
    Runs arms of one model on one device. All pairs of a batch share their timestep; the batches' timesteps are the same for
    every arm, and spread evenly over the noise schedule.

    Args:
        args: The command line's arguments.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        self.counter = ForwardCounter()
        pipeline = self.build()
        backbone = load_backbone(pipeline)
        backbone.to(torch.device(args.device))
        self.resolution = args.resolution or backbone.default_resolution
        self.timesteps = self.batch_timesteps(backbone)
        self.given = self.given_batch(backbone)
        # What the yardstick is, and the reference of the floor
        self.frozen = cast(denoiser_of(pipeline).requires_grad_(False).train(), self.dtype)
        self.lora_target_modules = backbone.lora_target_modules

    def batch_timesteps(self, backbone: Backbone) -> list[int]:
        """A timestep for each micro batch of the run. Those of the measured rounds are spread evenly, within rounds too."""
        args, micro_batches = self.args, self.args.gradient_accumulation_steps
        side = self.resolution // backbone.vae_scale_factor
        spread = backbone.process.evaluation_timesteps(args.steps * micro_batches, (side, side))
        rounds = [spread[index :: args.steps] for index in range(args.steps)]
        warm_up = [rounds[index % args.steps] for index in range(args.warmup)]
        return [timestep for micro_batches in (*warm_up, *rounds) for timestep in micro_batches]

    @torch.no_grad()
    def given_batch(self, backbone: Backbone) -> Given:
        """A batch for floor and yardstick, of random latents and noise."""
        rows, device = 2 * self.args.batch_size, self.args.device
        side, channels = self.resolution // backbone.vae_scale_factor, backbone.pipeline.vae.config.latent_channels
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(self.args.batch_size)]
        sizes = torch.full((rows, 2), self.resolution, device=device)
        conditions = {
            name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in backbone.encode_prompts(prompts).items()
        }
        conditions |= backbone.image_conditions(sizes, torch.zeros_like(sizes), (self.resolution, self.resolution))
        generator = torch.Generator().manual_seed(0)
        noisy_latents, noise = torch.randn(2, rows, channels, side, side, generator=generator).to(device, self.dtype)
        timesteps = torch.full((rows,), backbone.process.num_timesteps // 2, device=device)
        conditions = {name: value.to(self.dtype) for name, value in conditions.items()}
        return Given(noisy_latents, timesteps, noise, conditions)

    def run(self, name: str) -> Rounds:
        """Runs an arm by name and frees what it used."""
        if name in TRAINER_ARMS:
            rounds = self.run_trainer(*TRAINER_ARMS[name])
        elif name in SCRIPT_ARMS:
            rounds = self.run_script(name)
        else:
            rounds = self.run_floor(FLOOR_ARMS[name])
        release(self.args.device)
        return rounds.without_warm_up(self.args.warmup)

    def build(self) -> DiffusionPipeline:
        """A new pipeline, whose denoiser is counted, with text encoders in the type that they are loaded in."""
        pipeline = build_pipeline(self.args.model, self.args.device, self.dtype)
        self.counter.watch(denoiser_of(pipeline))
        return pipeline

    def stopwatch(self, policy: torch.nn.Module) -> Stopwatch:
        return Stopwatch(self.args.device, partial(self.floor, policy), self.yardstick, self.counter)

    def floor(self, policy: torch.nn.Module) -> None:
        for _ in range(self.args.gradient_accumulation_steps):
            floor_step(policy, self.frozen, self.given)
        policy.zero_grad()

    def yardstick(self) -> None:
        for _ in range(self.args.gradient_accumulation_steps):
            yardstick_step(self.frozen, self.given)

    def lora(self, **kwargs) -> LoraConfig:
        return LoraConfig(r=self.args.lora_rank, lora_alpha=self.args.lora_rank, **kwargs)

    def run_trainer(self, is_lora: bool, settings: dict[str, object]) -> Rounds:
        """This library's trainer, timed from step to step."""
        args = self.args
        ids = [
            f"{index * args.batch_size + row}-{timestep}"
            for index, timestep in enumerate(self.timesteps)
            for row in range(args.batch_size)
        ]
        with tempfile.TemporaryDirectory() as folder:
            if settings.get("precompute"):
                settings = settings | {"precompute_dir": f"{folder}/precomputed"}
            trainer = TimedTrainer(
                self.build(),
                args=InstanceDPOConfig(
                    folder,
                    num_train_epochs=1,
                    per_device_train_batch_size=args.batch_size,
                    per_device_eval_batch_size=2,  # of what is precomputed, so that memory is the step's
                    gradient_accumulation_steps=args.gradient_accumulation_steps,
                    train_sampling_strategy="sequential",
                    learning_rate=LEARNING_RATE,
                    optim=args.optim,
                    bf16=args.dtype == "bf16",
                    activation_checkpointing=args.activation_checkpointing,
                    torch_compile=args.torch_compile,
                    channels_last=args.channels_last,
                    resolution=self.resolution,
                    use_cpu=args.device == "cpu",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    **settings,
                ),
                train_dataset=image_pairs(ids, self.resolution),
                peft_config=self.lora() if is_lora else None,
            )
            trainer.remove_callback(PrinterCallback)
            stopwatch = self.stopwatch(trainer.model)
            trainer.add_callback(StopwatchCallback(stopwatch))
            trainer.train()
        return stopwatch.rounds

    def run_script(self, name: str) -> Rounds:
        """A published script's step, without its data loading; diffusers' takes the images of the pairs one by one."""
        args = self.args
        make_optimizer = self.optimizer_maker()
        accelerator = Accelerator(
            cpu=args.device == "cpu",
            mixed_precision="bf16" if args.dtype == "bf16" else "no",
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        pipeline = self.build()
        if args.activation_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        pairs, made = self.pixel_pairs(pipeline), (pipeline, accelerator, self.dtype, make_optimizer)
        if name in PAIR_SCRIPT_ARMS:
            script = PairScript(*made)
            micro_step = partial(script.micro_step, pairs, noised=PAIR_SCRIPT_ARMS[name])
        else:
            lora = self.lora(init_lora_weights="gaussian", target_modules=list(self.lora_target_modules))
            script, images = LoraScript(*made, lora), pairs.as_images()

            def micro_step(timestep):
                script.micro_step(images)  # each image has its own

        stopwatch = self.stopwatch(script.policy)
        for start in range(0, len(self.timesteps), args.gradient_accumulation_steps):
            stopwatch.start()
            for timestep in self.timesteps[start : start + args.gradient_accumulation_steps]:
                micro_step(timestep)
            stopwatch.stop()
        accelerator.free_memory()
        return stopwatch.rounds

    def optimizer_maker(self):
        """The trainer's optimizer for a script. Called before there is an `Accelerator`, whose state arguments reset."""
        arguments = TrainingArguments(
            "unused",
            optim=self.args.optim,
            learning_rate=LEARNING_RATE,
            report_to="none",
            use_cpu=self.args.device == "cpu",
        )
        optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return partial(optimizer_class, **optimizer_kwargs)

    def pixel_pairs(self, pipeline: DiffusionPipeline) -> PixelPairs:
        tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(self.args.batch_size)]
        input_ids = [
            tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for tokenizer in tokenizers
            if tokenizer is not None
        ]
        pixel_values = 2 * torch.rand(2 * self.args.batch_size, 3, self.resolution, self.resolution) - 1
        return PixelPairs(pixel_values, input_ids)

    def run_floor(self, is_lora: bool) -> Rounds:
        """The floor beside itself: how far the ratio is from 1 says how noisy the machine is."""
        policy = denoiser_of(build_pipeline(self.args.model, self.args.device)).train()
        if self.args.activation_checkpointing:
            policy.enable_gradient_checkpointing()
        if is_lora:
            cast(policy.requires_grad_(False), self.dtype)
            policy = get_peft_model(policy, self.lora(target_modules=list(self.lora_target_modules)))
        stopwatch = self.stopwatch(policy)
        for _ in range(self.args.warmup + self.args.steps):
            stopwatch.start()
            self.floor(policy)
            stopwatch.stop()
        return stopwatch.rounds
