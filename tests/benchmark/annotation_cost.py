# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Computes what annotating Pick-a-Pic v2, and CPO's paintings, costs: `python -m tests.benchmark.annotation_cost [--output FILE.json]`.

Nothing is measured. The roles make their requests from blank images; the real classes of transformers answer them at their
true sizes on the meta device, where tensors have shapes and no values, while torch counts floating-point operations. These
over a GPU's peak and an assumed utilization are hours. All inputs are options; where one is an assumption, its help says so.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SwinConfig,
)
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import get_vision_position_ids

from tests.benchmark.annotation import InstantVLM
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import ImageRecord, Instance, PairRecord
from trl_diffusion.annotation.vlm import Request
from trl_diffusion.criteria import Criteria


NOT_COUNTED = [
    "requests that are asked again, padding in batches, loading of models, what a server does besides",
    "element-wise work, norms, softmax and sampling of features: the utilization stands for them",
    "attention is counted as if it were not causal: at the defaults 1 % too much for pairs, 3 % for paintings",
]
CHAT_TOKENS = 19  # Qwen's template: the system's line, the headers of user and assistant, the ends of messages
TOKENS_AROUND_AN_IMAGE = 2
TOKENS_AROUND_A_LABEL = 3  # BERT's first and last token, and the full stop
PARTS = ["vision", "prefill", "answer"]  # of a request to the vision-language model
PARAMETERS = {"Qwen2.5-VL-7B": 8.29e9, "Grounding DINO base": 233e6}  # as published


@dataclass(frozen=True)
class Inputs:
    """What the cost follows from."""

    pairs: int = field(default=959_040, metadata={"help": "Image pairs. IAPO, Pick-a-Pic v2."})
    instances: int = field(default=1_205_593, metadata={"help": "Instances that the detector keeps. IAPO."})
    planned_labels: float = field(
        default=1.5,
        metadata={"help": "Labels a pair that the planner names. Assumed: only what the detector keeps is published."},
    )
    image_size: int = field(
        default=512, metadata={"help": "Sides of a pair's images. Assumed: sizes in the set vary."}
    )
    crop_size: int = field(default=336, metadata={"help": "Sides of the judge's crops. The library's default."})
    dataset_gigabytes: float = field(default=335.0, metadata={"help": "GB to read. Pick-a-Pic v2's Parquet files."})
    prompt_characters: int = field(default=100, metadata={"help": "Of an image's prompt. Assumed."})
    label_characters: int = field(default=8, metadata={"help": "Of an instance's label. Assumed."})
    characters_a_token: float = field(default=4.0, metadata={"help": "Of English text. Assumed."})
    planner_answer: int = field(default=15, metadata={"help": "Tokens of the planner's answer. Assumed."})
    judge_answer: int = field(default=8, metadata={"help": "Tokens of the judge's answer. Assumed."})
    expert_answer: int = field(default=60, metadata={"help": "Tokens of the attribute expert's answer. Assumed."})
    paintings: int = field(default=10_277, metadata={"help": "Paintings. CPO."})
    painting_size: int = field(default=1024, metadata={"help": "Sides of a painting. Assumed."})
    utilization: float = field(
        default=0.4,
        metadata={"help": "Share of a GPU's peak that is reached. Assumed, for work that is mostly prefill."},
    )
    answers_at_once: int = field(
        default=8, metadata={"help": "Requests that share one reading of the weights. TransformersVLM's batch_size."}
    )
    prepared_pairs_per_second: float = field(
        default=200.0, metadata={"help": "What the CPU prepares; `python -m tests.benchmark.annotation` measures it."}
    )
    prepare_cores: int = field(default=2, metadata={"help": "Cores that this takes."})

    def __post_init__(self):
        if wrong := [name for name, value in asdict(self).items() if value <= 0]:
            raise ValueError(f"These must be positive: {', '.join(wrong)}.")
        if self.planned_labels * self.pairs < self.instances:
            raise ValueError(
                f"{self.planned_labels} planned labels a pair are too few: the detector keeps "
                f"{self.instances / self.pairs:.3f} of them. Raise `planned_labels`."
            )


@dataclass(frozen=True)
class GPU:
    """A GPU's peaks, as its maker states them: dense operations a second, and bytes of memory read a second."""

    name: str
    bfloat16: float
    float32: float
    bandwidth: float


GPUS = [
    GPU("H100 SXM", 989e12, 67e12, 3.35e12),
    GPU("H800 SXM", 989e12, 67e12, 3.35e12),
    GPU("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12),
    GPU("L40S", 362e12, 91.6e12, 0.864e12),
    GPU("RTX 4090", 165e12, 82.6e12, 1.008e12),
]


@dataclass(frozen=True)
class Stage:
    """
    A role's share.

    Args:
        role (`str`):
            The role.
        runs (`float`):
            How often its model is asked.
        flops (`dict[str, float]`):
            What one time costs, by part.
        answer_steps (`int`):
            Steps of decoding after the prefill, each of which reads the weights.
    """

    role: str
    runs: float
    flops: dict[str, float]
    answer_steps: int

    @property
    def total_flops(self) -> float:
        return self.runs * sum(self.flops.values())


# ----- the models, without values -----


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL-7B."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    )
    return without_values(lambda: Qwen2_5_VLForConditionalGeneration(config))


def grounding_dino() -> GroundingDinoForObjectDetection:
    """Grounding DINO base."""
    backbone = SwinConfig(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        out_indices=[2, 3, 4],
    )
    config = GroundingDinoConfig(backbone_config=backbone, text_config=BertConfig(), num_queries=900)
    return without_values(lambda: GroundingDinoForObjectDetection(config))


def without_values(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Builds a model on the meta device."""
    with torch.device("meta"):
        return build().eval().to("meta")  # Grounding DINO makes one parameter with `torch.Tensor`, on the CPU


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ----- counting -----


def count(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions, two for each multiplication with its addition."""
    # The models check values, such as that sizes add up; there are none
    with torch.no_grad(), mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"):
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


def patch_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the patches that Qwen2.5-VL cuts an image into; four patches are one visual token."""
    processor = Qwen2VLImageProcessorPil(max_pixels=16384 * 28 * 28)  # as in the checkpoint's preprocessor_config.json
    rows, columns = (
        side // processor.patch_size
        for side in smart_resize(
            height,
            width,
            processor.patch_size * processor.merge_size,
            processor.size["shortest_edge"],
            processor.size["longest_edge"],
        )
    )
    assert rows * columns == processor.get_number_of_image_patches(height, width)
    return rows, columns


def visual_tokens(width: int, height: int) -> int:
    return math.prod(patch_grid(width, height)) // Qwen2VLImageProcessorPil.merge_size**2


def request_tokens(request: Request, characters_a_token: float) -> int:
    """Length of a request; that of its text is estimated."""
    images = sum(TOKENS_AROUND_AN_IMAGE + visual_tokens(*image.size) for image in request.images)
    return CHAT_TOKENS + images + math.ceil(len(request.text) / characters_a_token)


@cache
def vision_flops(vlm: Qwen2_5_VLForConditionalGeneration, width: int, height: int) -> int:
    """The whole vision tower on one image; images of a request do not see one another there."""
    config = vlm.config.vision_config
    grid = torch.tensor([[1, *patch_grid(width, height)]])
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.empty(int(grid.prod()), values, device="meta")
    positions = get_vision_position_ids(grid, config.spatial_merge_size).to("meta")
    return count(lambda: vlm.model.visual(pixels, grid_thw=grid, position_ids=positions))


def request_flops(
    vlm: Qwen2_5_VLForConditionalGeneration, request: Request, answer_tokens: int, characters_a_token: float
) -> dict[str, int]:
    """
    One request, in three parts, each counted on the real modules. What joins them, the placing of visual tokens among the
    text's, has no products.

    Args:
        vlm (`Qwen2_5_VLForConditionalGeneration`):
            The model, on the meta device.
        request ([`annotation.vlm.Request`]):
            The request.
        answer_tokens (`int`):
            Length of its answer. The prefill gives the first token, a step each further one; all steps are taken for as
            long as the first.
        characters_a_token (`float`):
            For the length of the request's text.

    Returns:
        `dict[str, int]`: `vision`, `prefill` and `answer`.
    """
    states = torch.empty(
        1, request_tokens(request, characters_a_token), vlm.config.text_config.hidden_size, device="meta"
    )
    caches = []

    def prefill():
        out = vlm.model.language_model(inputs_embeds=states, use_cache=True)
        caches.append(out.past_key_values)
        vlm.lm_head(out.last_hidden_state[:, -1:])

    def step():
        out = vlm.model.language_model(inputs_embeds=states[:, :1], past_key_values=caches[0], use_cache=True)
        vlm.lm_head(out.last_hidden_state)

    sizes = [image.size for image in request.images]
    return {
        "vision": sum(sizes.count(size) * vision_flops(vlm, *size) for size in set(sizes)),
        "prefill": count(prefill),
        "answer": (answer_tokens - 1) * count(step),
    }


def detector_flops(detector: GroundingDinoForObjectDetection, image_size: int, label_tokens: int) -> int:
    """The whole detector on one image and one label, the image resized as its processor does it."""
    height, width = get_size_with_aspect_ratio((image_size, image_size), 800, 1333)
    pixels = torch.empty(1, 3, height, width, device="meta")
    text = torch.empty(1, label_tokens, dtype=torch.long, device="meta")
    return count(lambda: detector(pixel_values=pixels, input_ids=text))


# ----- the roles -----


def blank(size: int) -> StoredImage:
    return StoredImage.read(Image.new("RGB", (size, size)))


def pair_requests(inputs: Inputs) -> tuple[Request, tuple[Request, ...]]:
    """The planner's request about a pair, and the judge's requests about an instance."""
    image = blank(inputs.image_size)
    pair = PairRecord("id", "x" * inputs.prompt_characters, chosen=image, rejected=image)
    box = [0.25, 0.25, 0.75, 0.75]
    instance = Instance("x" * inputs.label_characters, box, box, 1.0, 1.0)
    vlm = InstantVLM()
    return Planner(vlm).request(pair), Judge(vlm, crop_size=inputs.crop_size).requests(pair, instance)


def painting_requests(inputs: Inputs) -> list[Request]:
    """The attribute expert's requests about a painting, one a dimension of the shipped tree."""
    expert = AttributeExpert(InstantVLM(), Criteria.load("painting"))
    painting = ImageRecord("id", "x" * inputs.prompt_characters, image=blank(inputs.painting_size))
    return [expert.request(painting, dimension) for dimension in expert.criteria.dimensions]


def pair_stages(
    vlm: Qwen2_5_VLForConditionalGeneration, detector: GroundingDinoForObjectDetection, inputs: Inputs
) -> list[Stage]:
    """What the three roles of IAPO do."""
    plan, verdicts = pair_requests(inputs)
    label_tokens = math.ceil(inputs.label_characters / inputs.characters_a_token) + TOKENS_AROUND_A_LABEL
    return [
        Stage(
            "planner",
            inputs.pairs,
            request_flops(vlm, plan, inputs.planner_answer, inputs.characters_a_token),
            inputs.planner_answer - 1,
        ),
        Stage(
            "detector",
            2 * inputs.planned_labels * inputs.pairs,
            {"forward": detector_flops(detector, inputs.image_size, label_tokens)},
            0,
        ),
        Stage(
            "judge",
            len(verdicts) * inputs.instances,
            request_flops(vlm, verdicts[0], inputs.judge_answer, inputs.characters_a_token),
            inputs.judge_answer - 1,
        ),
    ]


def painting_stages(vlm: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> list[Stage]:
    """What the attribute expert of CPO does; the dimensions' requests differ in length, so each is counted."""
    requests = painting_requests(inputs)
    costs = [request_flops(vlm, request, inputs.expert_answer, inputs.characters_a_token) for request in requests]
    mean = {part: sum(cost[part] for cost in costs) / len(costs) for part in costs[0]}
    return [Stage("attribute expert", len(requests) * inputs.paintings, mean, inputs.expert_answer - 1)]


# ----- from operations to hours -----


def hours(flops: float, peak: float, utilization: float) -> float:
    return flops / (peak * utilization) / 3600


def reading_hours(stages: list[Stage], vlm: torch.nn.Module, gpu: GPU, answers_at_once: int) -> float:
    """Hours in which the decoder's weights are read, in bfloat16, once for each step of a batch's answers."""
    weights = num_parameters(vlm.model.language_model.layers) + num_parameters(vlm.lm_head)
    steps = sum(stage.runs * stage.answer_steps for stage in stages) / answers_at_once
    return steps * 2 * weights / gpu.bandwidth / 3600


def on_gpu(gpu: GPU, stages: list[Stage], num_rows: int, vlm: torch.nn.Module, inputs: Inputs) -> dict[str, object]:
    """GPU hours of all stages, and the rows a second at which one GPU takes them."""
    by_role = {stage.role: hours(stage.total_flops, gpu.bfloat16, inputs.utilization) for stage in stages}
    result = {
        "gpu": asdict(gpu),
        "hours": by_role,
        "total_hours": sum(by_role.values()),
        "hours_reading_weights_for_answers": reading_hours(stages, vlm, gpu, inputs.answers_at_once),
        "rows_per_second": num_rows / sum(by_role.values()) / 3600,
    }
    for stage in stages:
        if stage.role == "detector":
            slow = hours(stage.total_flops, gpu.float32, inputs.utilization)
            result["detector_hours_float32"] = slow
            result["total_hours_detector_float32"] = result["total_hours"] - by_role["detector"] + slow
    return result


def feeding(result: dict, inputs: Inputs) -> dict[str, float]:
    """What one GPU asks of the CPU and of the disk, where all models are in bfloat16."""
    rate = result["rows_per_second"]
    return {
        "pairs_per_second": rate,
        "gpus_fed": inputs.prepared_pairs_per_second / rate,
        "cores_per_gpu": inputs.prepare_cores * rate / inputs.prepared_pairs_per_second,
        "megabytes_per_second": 1000 * inputs.dataset_gigabytes / inputs.pairs * rate,
    }


def compute(inputs: Inputs) -> dict[str, object]:
    """All figures."""
    models = {"Qwen2.5-VL-7B": qwen(), "Grounding DINO base": grounding_dino()}
    for name, model in models.items():
        assert abs(num_parameters(model) / PARAMETERS[name] - 1) < 0.01, f"{name}: {num_parameters(model)}"
    vlm, detector = models.values()
    stages, paintings = pair_stages(vlm, detector, inputs), painting_stages(vlm, inputs)
    plan, verdicts = pair_requests(inputs)
    inspections = painting_requests(inputs)
    lengths = [request_tokens(request, inputs.characters_a_token) for request in (plan, verdicts[0], *inspections)]
    layers = num_parameters(vlm.model.language_model.layers)
    vlm_requests = sum(stage.runs for stage in stages if stage.role != "detector")
    results = [on_gpu(gpu, stages, inputs.pairs, vlm, inputs) for gpu in GPUS]
    return {
        "how": "computed, not measured",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {
            item.name: {"value": asdict(inputs)[item.name], "what": item.metadata["help"]} for item in fields(Inputs)
        },
        "not_counted": NOT_COUNTED,
        "check": {
            "parameters": {name: num_parameters(model) for name, model in models.items()},
            "published_parameters": PARAMETERS,
            # The rest are attention and one row of the vocabulary's matrix
            "planner_prefill_over_2_parameters_tokens": stages[0].flops["prefill"] / (2 * layers * lengths[0]),
        },
        "tokens": {
            "planner": lengths[0],
            "judge": lengths[1],
            "attribute expert": lengths[2:],
            "visual, an image of a pair": visual_tokens(*plan.images[0].size),
            "visual, a crop": visual_tokens(*verdicts[0].images[0].size),
            "visual, a painting": visual_tokens(*inspections[0].images[0].size),
        },
        "vlm_requests_per_pair": vlm_requests / inputs.pairs,
        "kilobytes_per_pair": 1e6 * inputs.dataset_gigabytes / inputs.pairs,
        "pairs": [asdict(stage) | {"total_flops": stage.total_flops} for stage in stages],
        "pairs_on": [result | feeding(result, inputs) for result in results],
        "paintings": [asdict(stage) | {"total_flops": stage.total_flops} for stage in paintings],
        "paintings_on": [on_gpu(gpu, paintings, inputs.paintings, vlm, inputs) for gpu in GPUS],
    }


# ----- what is printed -----


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(found: dict) -> str:
    """The figures as tables in Markdown."""
    given = {name: entry["value"] for name, entry in found["inputs"].items()}
    parameters = ", ".join(f"{name} {number:,}" for name, number in found["check"]["parameters"].items())
    stages = [
        [
            stage["role"],
            f"{stage['runs']:,.0f}",
            *(f"{stage['flops'][part] / 1e12:.2f}" if part in stage["flops"] else "" for part in PARTS),
            f"{sum(stage['flops'].values()) / 1e12:.2f}",
            f"{stage['total_flops'] / 1e18:.2f}",
        ]
        for stage in (*found["pairs"], *found["paintings"])
    ]
    pairs = [
        [
            row["gpu"]["name"],
            *(f"{row['hours'][role]:.1f}" for role in ("planner", "detector", "judge")),
            f"{row['total_hours']:.1f}",
            f"{row['detector_hours_float32']:.1f}",
            f"{row['total_hours_detector_float32']:.1f}",
            f"{row['hours_reading_weights_for_answers']:.1f}",
        ]
        for row in found["pairs_on"]
    ]
    feeds = [
        [
            row["gpu"]["name"],
            f"{row['pairs_per_second']:.1f}",
            f"{row['gpus_fed']:.1f}",
            f"{row['cores_per_gpu']:.2f}",
            f"{row['megabytes_per_second']:.1f}",
        ]
        for row in found["pairs_on"]
    ]
    paintings = [
        [
            row["gpu"]["name"],
            f"{row['total_hours']:.1f}",
            f"{row['hours_reading_weights_for_answers']:.1f}",
            f"{row['rows_per_second']:.2f}",
        ]
        for row in found["paintings_on"]
    ]
    batch = f"weights read for answers, {given['answers_at_once']} at once"
    return "\n\n".join(
        [
            f"Computed, not measured. Parameters: {parameters}. The planner's prefill is "
            f"{found['check']['planner_prefill_over_2_parameters_tokens']:.3f} times 2 x parameters of the decoder's layers x tokens.",
            "Tokens of a request: " + ", ".join(f"{name}: {number}" for name, number in found["tokens"].items()) + ".",
            f"A pair: {found['vlm_requests_per_pair']:.2f} requests to the vision-language model, "
            f"{2 * given['planned_labels']:.2f} runs of the detector, {found['kilobytes_per_pair']:.0f} KB read. In all "
            f"{given['dataset_gigabytes']:.0f} GB.",
            table(["TFLOP of one", "runs", *PARTS, "sum", "all runs, EFLOP"], stages),
            f"GPU hours for {given['pairs']:,} pairs at {given['utilization']:.0%} of the peak, bfloat16 but where it says "
            "float32. Reading weights comes on top, unless other requests compute meanwhile:",
            table(
                ["GPU", "planner", "detector", "judge", "**sum**", "detector in float32", "sum with that", batch],
                pairs,
            ),
            f"What one GPU takes (all in bfloat16), and how many GPUs {given['prepared_pairs_per_second']:.0f} prepared pairs/s "
            f"on {given['prepare_cores']} cores feed:",
            table(["GPU", "pairs/s", "GPUs fed", "cores a GPU", "MB/s read"], feeds),
            f"GPU hours for {given['paintings']:,} paintings:",
            table(["GPU", "hours", batch, "paintings/s"], paintings),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    for item in fields(Inputs):
        text = f"{item.metadata['help']} Default: {item.default}."
        parser.add_argument(f"--{item.name}", type=item.type, default=item.default, help=text)
    args = vars(parser.parse_args())
    output = args.pop("output")
    try:
        inputs = Inputs(**args)
    except ValueError as error:
        parser.error(str(error))
    found = compute(inputs)
    print(describe(found))
    if output:
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
