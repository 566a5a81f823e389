# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig

from trl_diffusion.metrics import metric_path
from trl_diffusion.metrics.image_reward import (
    UNUSED,
    ImageRewardModel,
    ImageRewardScorer,
    convert_image_reward,
    preprocess,
    published_config,
)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "and"]
PROMPTS = ["a red cat", "dog", "a cat and a dog " * 9]  # the last has 45 tokens


def tiny_config() -> BlipConfig:
    return BlipConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": len(WORDS),
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 40,
            "bos_token_id": 2,
            "sep_token_id": 3,
        },
    )


def published_shapes(config: BlipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the published file, according to the published code."""
    vision, text = config.vision_config, config.text_config
    v, t = vision.hidden_size, text.hidden_size
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, v),
        "blip.visual_encoder.pos_embed": (1, (vision.image_size // vision.patch_size) ** 2 + 1, v),
        "blip.text_encoder.embeddings.position_ids": (1, text.max_position_embeddings),
        "blip.text_encoder.embeddings.word_embeddings.weight": (text.vocab_size, t),
        "blip.text_encoder.embeddings.position_embeddings.weight": (text.max_position_embeddings, t),
    }

    def layer(name: str, *weight: int):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    layer("blip.visual_encoder.patch_embed.proj", v, 3, vision.patch_size, vision.patch_size)
    for index in range(vision.num_hidden_layers):
        block = f"blip.visual_encoder.blocks.{index}"
        layer(f"{block}.norm1", v)
        layer(f"{block}.attn.qkv", 3 * v, v)
        layer(f"{block}.attn.proj", v, v)
        layer(f"{block}.norm2", v)
        layer(f"{block}.mlp.fc1", vision.intermediate_size, v)
        layer(f"{block}.mlp.fc2", v, vision.intermediate_size)
    layer("blip.visual_encoder.norm", v)
    layer("blip.text_encoder.embeddings.LayerNorm", t)
    for index in range(text.num_hidden_layers):
        block = f"blip.text_encoder.encoder.layer.{index}"
        for attention, width in (("attention", t), ("crossattention", v)):
            layer(f"{block}.{attention}.self.query", t, t)
            layer(f"{block}.{attention}.self.key", t, width)
            layer(f"{block}.{attention}.self.value", t, width)
            layer(f"{block}.{attention}.output.dense", t, t)
            layer(f"{block}.{attention}.output.LayerNorm", t)
        layer(f"{block}.intermediate.dense", text.intermediate_size, t)
        layer(f"{block}.output.dense", t, text.intermediate_size)
        layer(f"{block}.output.LayerNorm", t)
    layer("blip.vision_proj", 256, v)
    layer("blip.text_proj", 256, t)
    for place, (inputs, outputs) in zip((0, 2, 4, 6, 7), ((t, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        layer(f"mlp.layers.{place}", outputs, inputs)
    return shapes


def published_tensors(config: BlipConfig | None = None, deviation: float = 0.5) -> dict[str, torch.Tensor]:
    """A file of weights, tiny by default. Embeddings are so small that the eps of the first norms matters."""
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes(config).items():
        tensor = torch.randn(shape, generator=generator) * deviation
        if "norm" in name.lower() and name.endswith("weight"):
            tensor += 1
        elif "embed" in name and "LayerNorm" not in name or name.endswith("cls_token"):
            tensor *= 2e-3
        elif name.startswith("mlp") and name.endswith("weight"):
            tensor *= 1.1 / deviation / math.sqrt(shape[1])  # rewards near 1
        tensors[name] = tensor
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(config.text_config.max_position_embeddings)[
        None
    ]
    return tensors


def plain_reward(
    tensors: dict[str, torch.Tensor],
    pixels: torch.Tensor,
    ids: list[int],
    mask: list[int],
    vision_heads: int = 2,
    text_heads: int = 3,
) -> float:
    """The reward of one image as in the published code, in float64 and with the published names."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    patch, vision_eps, text_eps = 16, 1e-6, 1e-12
    blocks, layers = (sum(name.endswith(last) for name in tensors) for last in ("norm1.weight", "self.query.weight"))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, visible: list[int]) -> torch.Tensor:
        width = q.shape[1] // heads
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(width)) * torch.tensor(visible)
            outputs.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, part])
        return torch.cat(outputs, dim=1)

    name = "blip.visual_encoder"
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    kernel = tensors[f"{name}.patch_embed.proj.weight"].flatten(1)
    x = [tensors[f"{name}.cls_token"][0, 0]]
    for row in range(rows):
        for column in range(columns):
            square = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].double()
            x.append(kernel @ square.flatten() + tensors[f"{name}.patch_embed.proj.bias"])
    x = torch.stack(x) + tensors[f"{name}.pos_embed"][0]
    for index in range(blocks):
        block = f"{name}.blocks.{index}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, vision_eps)).chunk(3, dim=1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, vision_heads, [1] * len(x)))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, vision_eps))))
    image = norm(f"{name}.norm", x, vision_eps)

    name = "blip.text_encoder"
    x = tensors[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + tensors[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(f"{name}.embeddings.LayerNorm", x, text_eps)
    for index in range(layers // 2):  # each has two attentions
        block = f"{name}.encoder.layer.{index}"
        for attention, seen, visible in (("attention", None, mask), ("crossattention", image, [1] * len(image))):
            seen = x if seen is None else seen
            q = linear(f"{block}.{attention}.self.query", x)
            k, v = linear(f"{block}.{attention}.self.key", seen), linear(f"{block}.{attention}.self.value", seen)
            attended = linear(f"{block}.{attention}.output.dense", attend(q, k, v, text_heads, visible))
            x = norm(f"{block}.{attention}.output.LayerNorm", attended + x, text_eps)
        inner = linear(f"{block}.output.dense", gelu(linear(f"{block}.intermediate.dense", x)))
        x = norm(f"{block}.output.LayerNorm", inner + x, text_eps)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{place}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ImageReward.pt"
    torch.save(published_tensors(), path)
    return str(path)


@pytest.fixture
def scorer(weights_path, tokenizer):
    return ImageRewardScorer(weights_path, tokenizer_name_or_path=tokenizer, config=tiny_config(), device="cpu")


def padded(prompt: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and its attention mask."""
    ids = [2, *(WORDS.index(word) for word in prompt.split())][:34] + [3]
    padding = 35 - len(ids)
    return ids + [0] * padding, [1] * len(ids) + [0] * padding


def test_rewards_are_those_of_the_published_code(scorer):
    """A score equals a float64 computation with the published tensors to 1e-5, for padded and truncated prompts."""
    images = [picture(40, 32, seed=seed) for seed in range(3)]
    scores = scorer.score(images, PROMPTS).values
    assert max(scores) - min(scores) > 0.1
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        expected = plain_reward(published_tensors(), preprocess(image, 32), *padded(prompt))
        assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_rewards_at_true_size(tokenizer, tmp_path):
    """Scores are also equal with the sizes of ImageReward-v1.0."""
    tensors = published_tensors(published_config(), deviation=0.02)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    scorer = ImageRewardScorer(tmp_path / "ImageReward.pt", tokenizer_name_or_path=tokenizer, device="cpu")
    image = picture(300, 260)
    (score,) = scorer.score([image], PROMPTS[:1]).values
    expected = plain_reward(tensors, preprocess(image, 224), *padded(PROMPTS[0]), vision_heads=16, text_heads=12)
    assert score == pytest.approx(expected, rel=1e-5)


def test_a_reward_is_normalised(weights_path, tokenizer, tmp_path):
    """A raw reward at the mean scores 0, and one standard deviation above it scores 1."""
    for raw, expected in ((0.16717362830052426, 0.0), (0.16717362830052426 + 1.0333394966054072, 1.0)):
        tensors = published_tensors()
        tensors["mlp.layers.7.weight"].zero_()
        tensors["mlp.layers.7.bias"].fill_(raw)
        torch.save(tensors, tmp_path / "weights.pt")
        scorer = ImageRewardScorer(
            str(tmp_path / "weights.pt"), tokenizer_name_or_path=tokenizer, config=tiny_config()
        )
        assert scorer.score([picture(32, 32)], ["cat"]).values == pytest.approx([expected], abs=1e-6)


def test_a_score_depends_on_its_own_image_and_prompt(scorer):
    """Other images in the batch change a score only by float32 rounding; another image or prompt changes it more."""
    images = [picture(32, 48, seed=seed) for seed in range(3)]
    together = scorer.score(images, PROMPTS, batch_size=3).values
    assert scorer.score(images, PROMPTS, batch_size=1).values == pytest.approx(together, abs=2e-6)
    assert scorer.score(images[::-1], PROMPTS[::-1]).values == pytest.approx(together[::-1], abs=2e-6)
    for others in (scorer.score(images[::-1], PROMPTS), scorer.score(images, PROMPTS[::-1])):
        assert abs(others.values[0] - together[0]) > 1e-4


@pytest.mark.parametrize(
    "size, resized, corner",
    [
        ((300, 200), (336, 224), (56, 0)),
        ((100, 333), (224, 745), (0, 260)),  # half of 521 is 260.5, which rounds to even
        ((224, 224), (224, 224), (0, 0)),
        ((31, 30), (231, 224), (4, 0)),  # 3.5 rounds to even
        ((512, 512), (224, 224), (0, 0)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_centre_of_the_resized_image_is_seen(size, resized, corner, mode):
    """The shorter side is resized to 224 with PIL's bicubic filter, the centre cropped, and transparency dropped
    last."""
    image = picture(*size, mode)
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    pixels = pixels[corner[1] : corner[1] + 224, corner[0] : corner[0] + 224]
    pixels = np.repeat(pixels[..., None], 3, axis=2) if mode == "L" else pixels[..., :3]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (pixels / 255 - mean) / std
    np.testing.assert_allclose(preprocess(image, 224).permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_the_published_file_fills_the_model():
    """At true size, the model has all published tensors except the five unused ones."""
    shapes = published_shapes(published_config())
    converted = convert_image_reward({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):
        model = ImageRewardModel(published_config())
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert len(shapes) == 625 and UNUSED <= shapes.keys() and len(UNUSED) == 5

    vit_large = 304_326_632 - (1000 * 1024 + 1000)  # timm's vit_large_patch16_224 without its classes
    bert_base = 109_482_240 - (768 * 768 + 768) - 2 * 768  # bert-base-uncased without its pooler and segments
    cross_attention = 2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768
    numbers = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.visual_encoder, model.text_encoder)
    ]
    assert numbers == [vit_large, bert_base + 2 * 768 + 12 * cross_attention]
    # The Hub gives the file's size as 1.79 GB
    assert round(4 * sum(math.prod(shape) for shape in shapes.values()) / 1e9, 2) == 1.79


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("mlp.layers.4.bias"), r"lacks mlp\.4\.bias"),
        (lambda tensors: tensors.pop("blip.visual_encoder.norm.bias"), r"lacks visual_encoder\.post_layernorm\.bias"),
        (lambda tensors: tensors.update(blip_itm=torch.zeros(1)), "has the unexpected tensors blip_itm"),
        (
            lambda tensors: tensors.update({"blip.text_encoder.pooler.dense.bias": torch.zeros(12)}),
            r"has the unexpected tensors text_encoder\.pooler\.dense\.bias",
        ),
        (lambda tensors: tensors.update({"mlp.layers.7.bias": torch.zeros(2)}), r"other shapes for mlp\.7\.bias"),
    ],
)
def test_every_tensor_is_accounted_for(tokenizer, tmp_path, change, message):
    """Errors name a missing, unexpected or misshapen tensor, and the file."""
    tensors = published_tensors()
    change(tensors)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=f"weights.pt .*{message}"):
        ImageRewardScorer(str(path), tokenizer_name_or_path=tokenizer, config=tiny_config())


def test_missing_files_are_explained(tokenizer, tmp_path, monkeypatch):
    """Without the published file, the error names the file, its source and the command that downloads it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"ImageReward\.pt of .*THUDM/ImageReward .*`hf download THUDM/ImageReward"):
        ImageRewardScorer(tokenizer_name_or_path=tokenizer)
    with pytest.raises(ValueError, match="no file of weights at .*nowhere.pt"):
        ImageRewardScorer(str(tmp_path / "nowhere.pt"), tokenizer_name_or_path=tokenizer)


def test_the_metric_is_the_scorer(scorer, weights_path, tokenizer, tmp_path):
    """`evaluate` returns the scorer's scores for files, their mean, and the weights and tokenizer."""
    files = []
    for seed in range(3):
        files.append(str(tmp_path / f"{seed}.png"))
        picture(40, 32, seed=seed).save(files[-1])
    metric = evaluate.load(
        metric_path("image_reward"), weights_path=weights_path, tokenizer_name_or_path=tokenizer, config=tiny_config()
    )
    result = metric.compute(images=files, prompts=PROMPTS)
    scores = scorer.score(files, PROMPTS)
    assert result["scores"] == pytest.approx(scores.values, abs=2e-6)
    assert result["image_reward"] == pytest.approx(scores.mean, abs=2e-6) and result["higher_is_better"]
    assert result["weights"].keys() == {weights_path, tokenizer}
    assert all(revision.startswith("sha256:") for revision in result["weights"].values())
