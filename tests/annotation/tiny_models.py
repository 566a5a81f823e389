# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Models of the roles with tiny random weights, saved to folders, and a vision-language model that is trained for its
roles."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import tiny
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import ImageRecord, Instance, PairRecord
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.annotation.vlm import Request, shipped_prompt
from trl_diffusion.criteria import parse_criteria


SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LABELS = ["cow", "tree"]  # the plan of the taught model for every request
ATTRIBUTES = {  # the answers of the taught model on each dimension of `tiny.CRITERIA`
    "color": {"positive": ["hue"], "negative": []},
    "drawing": {"positive": ["kind"], "negative": ["pet"]},
}


def shipped_prompts() -> str:
    return " ".join(shipped_prompt(name) for name in ("planner", "judge", "attribute_expert"))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte tokens, and one token for each word of the prompts, which makes requests four times shorter."""
    words = sorted(set(re.findall("[a-zA-Z]+", shipped_prompts())), key=lambda word: (-len(word), word))
    merges = [
        (word[:end], word[end]) for plain in words for word in (f"Ġ{plain}", plain) for end in range(1, len(word))
    ]
    merges = list(dict.fromkeys(merges))
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges), *SPECIAL])
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        extra_special_tokens=list(SPECIAL[1:]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_vlm(folder: Path, spread: float = 0.5) -> Path:
    """Qwen2.5-VL with about three hundred thousand random weights and standard deviation `spread`: large values make
    its outputs depend on the images, small ones make it trainable. An image has one to four tokens."""
    tokenizer = qwen_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "initializer_range": spread,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": spread,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llava(folder: Path) -> Path:
    """LLaVA without a video processor; both its tokenizer and its chat template add a first token."""
    tokenizer = Tokenizer(
        BPE(vocab={letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>")}
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    template = (
        "<s>{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=16, patch_size=8),
        text_config=LlamaConfig(**layers, vocab_size=len(tokenizer.get_vocab()), initializer_range=0.5),
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def shade(rng: np.random.Generator, bright: bool, width: int = 28, height: int = 28) -> Image.Image:
    """Noise around a bright or dark grey."""
    grey = rng.uniform(160, 235) if bright else rng.uniform(20, 95)
    return Image.fromarray(rng.normal(grey, 20, (height, width, 3)).clip(0, 255).astype(np.uint8))


class Lessons:
    """Requests of the roles for random images, with the expected answers."""

    def __init__(self, vlm: TransformersVLM):
        self.rng = np.random.default_rng(0)
        self.planner = Planner(vlm)
        self.judge = Judge(vlm, crop_size=28)
        self.expert = AttributeExpert(vlm, parse_criteria(tiny.CRITERIA, "tiny.yaml"))

    def photograph(self) -> StoredImage:
        """Smooth patches of random colours."""
        patches = Image.fromarray(self.rng.integers(0, 256, (*self.rng.integers(1, 5, 2), 3), dtype=np.uint8))
        return StoredImage.read(patches.resize(self.size(), Image.Resampling.BICUBIC))

    def size(self) -> tuple[int, int]:
        return tuple(self.rng.integers(28, 65, 2).tolist())

    def prompt(self) -> str:
        """One to fifty random fragments of the shipped prompts, more often few than many."""
        text = shipped_prompts()
        starts = self.rng.integers(0, len(text), int(50 ** self.rng.random()))
        return " ".join(text[start : start + self.rng.integers(1, 13)] for start in starts)

    def box(self) -> list[float]:
        x_min, y_min = self.rng.uniform(0, 0.5, 2)
        width, height = self.rng.uniform(0.2, 0.5, 2)
        return [x_min, y_min, x_min + width, y_min + height]

    def plan(self) -> tuple[Request, dict]:
        pair = PairRecord("id", self.prompt(), chosen=self.photograph(), rejected=self.photograph())
        return self.planner.request(pair), {"instances": LABELS}

    def verdict(self) -> tuple[Request, dict]:
        """A is better if it is bright, for any B. So a bright image wins over a dark one, and equal ones are a tie."""
        bright = self.rng.random(2) < 0.5
        images = [StoredImage.read(shade(self.rng, light, *self.size())) for light in bright]
        pair = PairRecord("id", self.prompt(), chosen=images[0], rejected=images[1])
        instance = Instance(str(self.rng.choice(LABELS)), self.box(), self.box(), 1.0, 1.0)
        return self.judge.requests(pair, instance)[0], {"better": "A" if bright[0] else "B"}

    def inspection(self) -> tuple[Request, dict]:
        dimension = str(self.rng.choice(list(ATTRIBUTES)))
        image = ImageRecord("id", self.prompt(), image=self.photograph())
        return self.expert.request(image, dimension), ATTRIBUTES[dimension]


def taught_vlm(folder: Path) -> Path:
    """[`tiny_vlm`], trained until it knows the planner's, the judge's and the attribute expert's answers."""
    vlm = TransformersVLM(str(tiny_vlm(folder, spread=0.1)), dtype="float32", device="cpu")
    lessons = Lessons(vlm)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), fused=True)
    losses = []
    for rate, enough, steps in ((3e-3, 0.5, 6), (7e-4, 0.05, 24)):  # learn the answers, then become confident
        optimizer.param_groups[0]["lr"] = rate
        while len(losses) < 24 or max(losses[-steps:]) > enough:
            lesson, size = [(lessons.verdict, 8), (lessons.plan, 4), (lessons.inspection, 4)][len(losses) % 3]
            loss = teaching_loss(vlm, [lesson() for _ in range(size)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            assert len(losses) < 1000, f"it learns nothing: {losses[-steps:]}"
    vlm.model.save_pretrained(folder)
    return folder


def taught_once(factory: pytest.TempPathFactory) -> Path:
    """[`taught_vlm`], created once for all workers of a test run."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "taught_vlm"
    with FileLock(root / "taught_vlm.lock"):
        if not folder.exists():
            taught_vlm(root / "unfinished_vlm").rename(folder)
    return folder


def teaching_loss(vlm: TransformersVLM, lessons: list[tuple[Request, dict]]) -> torch.Tensor:
    """The cross-entropy of the answer tokens given each request, summed over tokens and averaged over answers."""
    inputs = vlm.encode([vlm.chat(request) for request, _ in lessons])
    texts = [json.dumps(answer) + vlm.processor.tokenizer.eos_token for _, answer in lessons]
    answers = vlm.processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([inputs[name], answers[name]], dim=1)
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, answers["input_ids"].shape[1]))
    logits = vlm.model(**inputs, logits_to_keep=answers["input_ids"].shape[1] + 1).logits[:, :-1]
    costs = F.cross_entropy(logits.flatten(0, 1), answers["input_ids"].flatten(), reduction="none")
    return (costs * answers["attention_mask"].flatten()).sum() / len(lessons)


def bert_tokenizer() -> BertTokenizer:
    """Letters and the taught labels, with the tokens that end a phrase at the ids that Grounding DINO expects."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = {index: f"[unused{index}]" for index in range(1030)}
    tokens |= {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    tokens |= dict(enumerate([*LABELS, *letters, *(f"##{letter}" for letter in letters)], start=200))
    return BertTokenizer(vocab={token: index for index, token in tokens.items()}, model_max_length=256)


def tiny_detector(folder: Path) -> Path:
    """Grounding DINO with about two hundred thousand random weights. It always finds something, with scores above
    0.5."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config={
            "model_type": "bert",
            "vocab_size": 1030,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 256,
        },
        num_queries=12,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        encoder_n_points=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_n_points=2,
        d_model=32,
    )
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # initial weights do not move any box, and have high scores for all of them
        model.model.decoder.layer_norm.weight.fill_(0.1)
        for head in model.bbox_embed:
            head.layers[-1].weight.normal_(std=5.0)
    model.save_pretrained(folder)
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    GroundingDinoProcessor(images, bert_tokenizer()).save_pretrained(folder)
    return folder


def tiny_owl(folder: Path) -> Path:
    """OWL-ViT with ten thousand random weights. It reads labels of up to fourteen letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=16
    )
    config = OwlViTConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = OwlViTForObjectDetection(config)
    with torch.no_grad():  # initial weights put all boxes at the borders, and have high scores for all of them
        model.box_head.dense2.weight.mul_(0.1)
        model.class_head.logit_shift.weight.mul_(0.1)
        model.class_head.logit_scale.weight.mul_(0.1)
    model.save_pretrained(folder)
    images = OwlViTImageProcessorPil(size={"height": 32, "width": 32})
    OwlViTProcessor(images, tokenizer).save_pretrained(folder)
    return folder
