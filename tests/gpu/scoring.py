# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images a second of the scorers at true size, and what a 7B vision-language model answers a second in the roles of IAPO.

The scorers are those of `tests.benchmark.scoring`. The vision-language model has the shape of Qwen2.5-VL-7B and random weights in
bfloat16. It gets the images of planner and judge and as many tokens of text, at four characters a token, and answers with as many
tokens as `tests.benchmark.annotation_cost` assumes. A pair is one request of the planner and two of the judge for each of its
1.26 instances.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.benchmark import scoring
from tests.benchmark.annotation import INSTANCES, photograph
from tests.benchmark.annotation_cost import Inputs, qwen
from tests.gpu.record import Record, figure, stage_args
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import Instance, PairRecord
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.annotation.vlm import Request


SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>"
)


def make_files(folder: Path) -> dict[str, int]:
    """Writes a processor with a token for each letter, and returns the ids of its special tokens."""
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        extra_special_tokens=SPECIAL[1:],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    Qwen2VLImageProcessorPil(max_pixels=16384 * 28 * 28).save_pretrained(folder)
    return {token: vocab[token] for token in SPECIAL}


def make_model(ids: dict[str, int], args: argparse.Namespace) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL-7B with random weights in bfloat16, or a toy of its kind."""
    config: Qwen2_5_VLConfig = qwen().config
    text, vision = config.text_config, config.vision_config
    if args.tiny:
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.layer_types = 128, 128, 1, None
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 1, 1, 512
        vision.depth, vision.hidden_size, vision.num_heads, vision.out_hidden_size = 1, 32, 2, 128
        config = Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id = ids["<|vision_start|>"]
    config.text_config.pad_token_id = ids["<|endoftext|>"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):  # weights are drawn where they will be
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model.eval()  # without an end of answers, so that all are of one length


def pair(size: int, seed: int) -> PairRecord:
    images = [StoredImage(photograph(2 * seed + image, size)) for image in range(2)]
    box = [0.2, 0.2, 0.7, 0.7]
    return PairRecord(
        id=str(seed),
        prompt="a" * Inputs().prompt_characters,
        chosen=images[0],
        rejected=images[1],
        chosen_uid=f"{seed} chosen",
        rejected_uid=f"{seed} rejected",
        tie=False,
        instances=[Instance("a" * Inputs().label_characters, box, box, 0.9, 0.9)],
    )


def in_tokens(request: Request) -> Request:
    """The request with as many letters as its text has tokens, at four characters each."""
    return dataclasses.replace(request, text="a" * int(len(request.text) / Inputs().characters_a_token))


def measure_vlm(args: argparse.Namespace) -> dict:
    """Requests and tokens a second of planner and judge, and pairs a second."""
    size, num_pairs, rounds = (56, 1, 1) if args.tiny else (Inputs().image_size, 32, 3)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        model = make_model(make_files(Path(name)), args)
        result = {"seconds_to_make": time.perf_counter() - start}
        answers = {"planner": Inputs().planner_answer, "judge": Inputs().judge_answer}
        vlms = {
            role: TransformersVLM(name, batch_size=16, max_new_tokens=tokens, device=args.device)
            for role, tokens in answers.items()
        }
        pairs = [pair(size, seed) for seed in range(num_pairs)]
        judge = Judge(vlms["judge"], crop_size=28 if args.tiny else Inputs().crop_size)
        requests = {
            "planner": [Planner(vlms["planner"]).request(one) for one in pairs],
            "judge": [request for one in pairs for request in judge.requests(one, one.instances[0])],
        }
        for role, vlm in vlms.items():
            vlm.model = model
            asked, seconds = [in_tokens(request) for request in requests[role]], []
            prompt_tokens = vlm.encode([vlm.chat(asked[0])])["input_ids"].shape[1]
            for _ in range(rounds + 1):
                start = time.perf_counter()
                texts = vlm.generate(asked)  # cut off, which is no failure here
                seconds.append(time.perf_counter() - start)
            failures = [str(text) for text in texts if "cut off" not in str(text)]
            if failures:
                raise RuntimeError(f"The {role} was not answered: {failures[0]}")
            each = statistics.median(seconds[1:]) / len(asked)
            result[role] = {
                "requests_per_second": 1 / each,
                "prompt_tokens": prompt_tokens,
                "prompt_tokens_per_second": prompt_tokens / each,
                "answer_tokens": answers[role],
                "answer_tokens_per_second": answers[role] / each,
                "seconds": seconds,
            }
    a_pair = 1 / result["planner"]["requests_per_second"] + 2 * INSTANCES / result["judge"]["requests_per_second"]
    return result | {"pairs_per_second": 1 / a_pair}


def figures(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        if "error" in row:
            continue
        if row["what"] == "scorer":
            rate = row["images_per_second"]
            text = f"{rate['score']:.4g}, floor {rate['floor']:.4g}, time / floor {row['time_to_floor']:.2f}"
            found.append(figure(f"{row['name']}: images a second", text))
        else:
            text = ", ".join(
                f"{role} {row[role]['prompt_tokens_per_second']:.4g} + {row[role]['answer_tokens_per_second']:.4g}"
                for role in ("planner", "judge")
            )
            found.append(figure("7B VLM: tokens a second, of prompts + of answers", text))
            found.append(figure("7B VLM: pairs a second", f"{row['pairs_per_second']:.3g}"))
    return found


def main() -> None:
    args = stage_args(__doc__)
    record = Record(args, figures)
    few = ["--tiny", "--num_images", "2", "--size", "64"] if args.tiny else ["--num_images", "256"]
    of_scorers = scoring.parse_args(["--device", args.device, *few])
    for name in ("pickscore", "hpsv2", "aesthetic"):
        record.run({"what": "scorer", "name": name}, lambda name=name: scoring.measure(name, of_scorers), needs=10)
    record.run({"what": "vlm", "name": "Qwen2.5-VL-7B"}, lambda: measure_vlm(args), needs=5 if args.tiny else 25)


if __name__ == "__main__":
    main()
