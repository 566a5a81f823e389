# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation]",
# ]
# ///

"""
Compares models: each generates images from the same prompts and the same noise, and metrics score the images.

```bash
trl-diffusion evaluate \
    --models base=stable-diffusion-v1-5/stable-diffusion-v1-5 iapo=sd15-iapo-lora \
    --base_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --prompts parti --protocol iapo_sd15 \
    --metrics pickscore hpsv2 aesthetic clip_score image_reward \
    --output_dir evaluation
```

If it is stopped, the same command continues; with another model or metric it adds only what is missing. With several GPUs all
of them generate images, and the first one scores them.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.judges import DetectorArguments, VLMArguments


if TYPE_CHECKING:
    from collections.abc import Callable

    from trl_diffusion.evaluation.models import ModelSpec
    from trl_diffusion.metrics.scorer import Scorer

# Module and class of each metric of single images that needs only its weights
SCORERS = {
    "pickscore": "PickScoreScorer",
    "hpsv2": "HPSv2Scorer",
    "hpsv2_1": "HPSv2_1Scorer",
    "aesthetic": "AestheticScorer",
    "clip_score": "CLIPScoreScorer",
    "image_reward": "ImageRewardScorer",
}
JUDGED = ("num_negative_attributes", "caption_match")
OF_ALL_IMAGES = ("fid", "kid")


@dataclass
class EvaluateArguments:
    """
    Arguments of `trl-diffusion evaluate` besides those of the vision-language model and the detector.

    Parameters:
        models (`list[str]`, *optional*):
            The models, each as `NAME=WHERE`: the Hub id or the folder of a pipeline, a LoRA, a denoiser or a checkpoint, a single file
            or its link on the Hub, or a folder of images. The first one is the baseline of the win rates.
        base_model (`str`, *optional*):
            The pipeline of LoRAs and denoisers, which also gives a single file its configuration. Defaults to the one that the card
            of a LoRA names.
        sample_model (`str`, *optional*):
            The pipeline that draws with LoRAs in place of their base, such as a distilled sibling of it. Pipelines draw by themselves.
        negative_loras (`list[str]`, *optional*):
            `NAME=WHERE`: a LoRA for the unconditional branch of guidance of the model NAME (Diffusion-NPO), on top of the model.
        negative_loras_on_base (`list[str]`, *optional*):
            Names of models, all of them LoRAs, whose negative LoRA is added to their base alone, without them.
        vae (`str`, *optional*):
            The VAE of all models in place of their own: Hub id or folder of a VAE or of a pipeline, or a single file.
        prompts (`str`, *optional*, defaults to `"parti"`):
            `parti`, `hpdv2`, `pickapic`, a file, or a dataset of the Hub.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts, in your own file or dataset.
        prompt_split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset.
        prompt_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        num_prompts (`int`, *optional*):
            Use only this many prompts, taken at equal distances.
        protocol (`str`, *optional*):
            How to sample: `iapo_sd15`, `iapo_sdxl`, `cpo_sdxl`, or a YAML file. The next nine flags override it.
        num_inference_steps (`int`, *optional*):
            Sampling steps; 50 without a protocol.
        guidance_scale (`float`, *optional*):
            Guidance; the pipeline's own without a protocol.
        scheduler (`str`, *optional*):
            A scheduler class of diffusers; the model's own without a protocol.
        height (`int`, *optional*), width (`int`, *optional*):
            Size in pixels; the model's own without a protocol.
        images_per_prompt (`int`, *optional*):
            Images per prompt; 1 without a protocol.
        seed (`int`, *optional*):
            Seed of the noise; 0 without a protocol.
        max_sequence_length (`int`, *optional*):
            Tokens that are read of a prompt, as in the training; the pipeline's own without a protocol.
        true_cfg_scale (`float`, *optional*):
            Classifier-free guidance of FLUX.1, whose `guidance_scale` is something else, and of Qwen-Image.
        metrics (`list[str]`, *optional*, defaults to `["pickscore", "hpsv2", "aesthetic", "clip_score"]`):
            The metrics: `pickscore`, `hpsv2`, `hpsv2_1`, `aesthetic`, `clip_score`, `image_reward`, `fid`, `kid`,
            `num_negative_attributes`, `caption_match`.
        references (`str`, *optional*):
            A folder of images with which `fid` and `kid` compare.
        criteria (`str`, *optional*, defaults to `"painting"`):
            The tree of `num_negative_attributes`: a YAML file, or the name of a tree that comes with the package.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Where images, scores, tables, plots and the gallery are written.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that each process generates per batch.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Images scored per batch.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the models' weights. `"auto"`: on a GPU float16, for pipelines with a transformer bfloat16; float32 on a CPU.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Use the CPU, even if there is a GPU.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Score images again that were errors in an earlier run.
        push_to_hub (`str`, *optional*):
            Repository on the Hub, `USER/NAME` or `NAME`, that the evaluation is pushed to as a dataset.
        private (`bool`, *optional*, defaults to `False`):
            Make this repository private if it is new.
        hub_revision (`str`, *optional*):
            Branch to push to. It is created if there is none.
        hub_token (`str`, *optional*):
            Token for the push. Defaults to that of `hf auth login` or HF_TOKEN.
    """

    models: list[str] | None = field(
        default=None,
        metadata={"help": "The models, each NAME=WHERE: a pipeline, LoRA, denoiser, checkpoint, or folder of images."},
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "The pipeline of LoRAs and denoisers. Defaults to the one that the card of a LoRA names."},
    )
    sample_model: str | None = field(
        default=None,
        metadata={"help": "The pipeline that draws with LoRAs in place of their base, such as a distilled sibling."},
    )
    negative_loras: list[str] | None = field(
        default=None,
        metadata={"help": "NAME=WHERE: a LoRA for the unconditional branch of the model NAME, on top of the model."},
    )
    negative_loras_on_base: list[str] | None = field(
        default=None,
        metadata={"help": "Names of models whose negative LoRA is added to their base alone."},
    )
    vae: str | None = field(
        default=None, metadata={"help": "The VAE of all models in place of their own: a Hub id, a folder or a file."}
    )
    prompts: str = field(
        default="parti", metadata={"help": "`parti`, `hpdv2`, `pickapic`, a file, or a dataset of the Hub."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    prompt_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "Use only this many prompts, taken at equal distances."}
    )
    protocol: str | None = field(
        default=None, metadata={"help": "How to sample: `iapo_sd15`, `iapo_sdxl`, `cpo_sdxl`, or a YAML file."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Sampling steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance."})
    scheduler: str | None = field(default=None, metadata={"help": "A scheduler class of diffusers."})
    height: int | None = field(default=None, metadata={"help": "Height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels."})
    images_per_prompt: int | None = field(default=None, metadata={"help": "Images per prompt."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the noise."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens that are read of a prompt, as in the training."}
    )
    true_cfg_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance of FLUX.1 and Qwen-Image."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["pickscore", "hpsv2", "aesthetic", "clip_score"],
        metadata={"help": "The metrics.", "choices": [*SCORERS, *OF_ALL_IMAGES, *JUDGED]},
    )
    references: str | None = field(
        default=None, metadata={"help": "A folder of images with which `fid` and `kid` compare."}
    )
    criteria: str = field(
        default="painting",
        metadata={"help": "The tree of `num_negative_attributes`: a YAML file, or the name of a tree in the package."},
    )
    output_dir: str = field(
        default="evaluation", metadata={"help": "Where images, scores, tables, plots and the gallery are written."}
    )
    batch_size: int = field(default=8, metadata={"help": "Images that each process generates per batch."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Images scored per batch."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the models' weights; auto: half precision on a GPU, float32 on a CPU.",
            "choices": ["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"],
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU, even if there is a GPU."})
    retry_errors: bool = field(
        default=False, metadata={"help": "Score images again that were errors in an earlier run."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Push the evaluation as a dataset to this repository, USER/NAME or NAME."}
    )
    private: bool = field(default=False, metadata={"help": "Make this repository private if it is new."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to push to. It is created if there is none."}
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token for the push. Defaults to that of `hf auth login` or HF_TOKEN."},
    )

    def __post_init__(self):
        for name in ("batch_size", "scoring_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.models:
            raise ValueError(
                "`--models` is missing: name the models to compare, such as `--models base=user/base aligned=my-lora`."
            )
        if self.corpus_metrics and not self.references:
            raise ValueError(
                f"`--references` is missing: name the folder of images with which {' and '.join(self.corpus_metrics)} compare."
            )
        for name in ("private", "hub_revision", "hub_token"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`--{name}` needs a repository: name one with `--push_to_hub`.")

    @property
    def corpus_metrics(self) -> tuple[str, ...]:
        """The metrics that compare all images of a model with `references`."""
        return tuple(name for name in self.metrics if name in OF_ALL_IMAGES)


def main(args: EvaluateArguments, vlm_args: VLMArguments, detector_args: DetectorArguments) -> None:
    from trl_diffusion.evaluation.prompts import load_prompts
    from trl_diffusion.evaluation.protocols import load_protocol
    from trl_diffusion.evaluation.push import push_evaluation
    from trl_diffusion.evaluation.run import evaluate_models

    if args.push_to_hub:
        check_push(args.push_to_hub, args.hub_token)
    protocol = load_protocol(
        args.protocol,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        height=args.height,
        width=args.width,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        max_sequence_length=args.max_sequence_length,
        true_cfg_scale=args.true_cfg_scale,
    )
    scorers = get_scorers(args, vlm_args, detector_args)
    specs = get_models(args)
    prompt_set = load_prompts(
        args.prompts, args.num_prompts, args.prompt_column, args.prompt_split, args.prompt_revision
    )
    summary = evaluate_models(
        specs,
        prompt_set,
        protocol,
        scorers,
        args.output_dir,
        args.corpus_metrics,
        args.references,
        batch_size=args.batch_size,
        scoring_batch_size=args.scoring_batch_size,
        dtype=args.dtype,
        use_cpu=args.use_cpu,
        retry_errors=args.retry_errors,
    )
    if summary is not None:
        print(f"Evaluated {', '.join(summary['models'])}: look at report.md and gallery.html in {args.output_dir}.")
        if args.push_to_hub:
            address = push_evaluation(
                args.output_dir, args.push_to_hub, args.private or None, args.hub_revision, args.hub_token
            )
            print(f"Pushed to {address}, without gallery.html, which the Hub does not show.")


def check_push(repo_id: str, token: str | None) -> None:
    """Refuses, before hours of sampling, a push that cannot succeed."""
    from trl_diffusion.hub import NO_TOKEN, check_repository_name, has_token

    check_repository_name(repo_id, "`--push_to_hub`")
    if not has_token(token):
        raise ValueError(f"`--push_to_hub` needs a token of the Hub. {NO_TOKEN}")


def get_models(args: EvaluateArguments) -> list["ModelSpec"]:
    """The models that the flags name, each with its exact version."""
    from trl_diffusion.evaluation.models import parse_model, resolve_model

    negative_loras = dict(parse_model(text) for text in args.negative_loras or [])
    named = [parse_model(text) for text in args.models]
    if unknown := sorted(negative_loras.keys() - {name for name, _ in named}):
        raise ValueError(f"`--negative_loras` names {', '.join(unknown)}, and `--models` has no such model.")
    on_base = set(args.negative_loras_on_base or [])
    if without := sorted(on_base - negative_loras.keys()):
        raise ValueError(
            f"`--negative_loras_on_base` names {', '.join(without)}, and `--negative_loras` has nothing for "
            f"{'it' if len(without) == 1 else 'them'}."
        )
    specs = [
        resolve_model(
            *(name, where, args.base_model, negative_loras.get(name), args.vae, args.sample_model),
            negative_lora_on="base" if name in on_base else "aligned",
        )
        for name, where in named
    ]
    if args.sample_model is not None:
        check_sample_model(specs, args.sample_model)
    return specs


def check_sample_model(specs: list["ModelSpec"], sample_model: str) -> None:
    """Refuses a sample model that draws nothing, and warns where the LoRAs are not compared with it."""
    revisions = {spec.base_revision for spec in specs if spec.kind == "lora"}
    if not revisions:
        raise ValueError(
            "`--sample_model` draws with LoRAs, and `--models` has none: a pipeline draws by itself. Leave it out."
        )
    if not any(spec.kind == "pipeline" and spec.revision in revisions for spec in specs):
        logging.getLogger(__name__).warning(
            f"The LoRAs are drawn by {sample_model}, which `--models` does not have by itself: put NAME={sample_model} first to see "
            "what they change."
        )


def get_scorers(
    args: EvaluateArguments, vlm_args: VLMArguments, detector_args: DetectorArguments
) -> dict[str, "Callable[[], Scorer]"]:
    """A function that makes the scorer, for each metric of single images that the flags name."""
    from importlib import import_module

    from trl_diffusion.criteria import Criteria
    from trl_diffusion.scripts.judges import get_detector, get_vlm

    device = "cpu" if args.use_cpu else None
    criteria = Criteria.load(args.criteria) if "num_negative_attributes" in args.metrics else None

    def of_weights(name: str) -> "Scorer":
        return getattr(import_module(f"trl_diffusion.metrics.{name}"), SCORERS[name])(device=device)

    def num_negative_attributes() -> "Scorer":
        from trl_diffusion.annotation.attribute_expert import AttributeExpert
        from trl_diffusion.metrics.num_negative_attributes import NumNegativeAttributesScorer

        return NumNegativeAttributesScorer(AttributeExpert(get_vlm(vlm_args), criteria))

    def caption_match() -> "Scorer":
        from trl_diffusion.metrics.caption_match import CaptionMatchScorer, VLMThings

        return CaptionMatchScorer(get_detector(detector_args), VLMThings(get_vlm(vlm_args)))

    judged = {"num_negative_attributes": num_negative_attributes, "caption_match": caption_match}
    return {
        name: judged[name] if name in judged else partial(of_weights, name)
        for name in args.metrics
        if name not in OF_ALL_IMAGES
    }


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((EvaluateArguments, VLMArguments, DetectorArguments), prog=prog, is_launched=True)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("evaluate", lambda: sys.modules[__name__]))
