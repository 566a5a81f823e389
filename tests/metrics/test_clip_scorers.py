# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import evaluate
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from trl_diffusion.metrics import clip, hpsv2, metric_path, pickscore
from trl_diffusion.metrics.aesthetic import AestheticScorer
from trl_diffusion.metrics.clip import VIT_H_14, CosineScorer
from trl_diffusion.metrics.clip_score import CLIPScoreScorer
from trl_diffusion.metrics.hpsv2 import HPSv2Scorer, clean_prompt, fit_into_square
from trl_diffusion.metrics.hpsv2_1 import HPSv2_1Scorer
from trl_diffusion.metrics.open_clip import convert_open_clip
from trl_diffusion.metrics.pickscore import PickScoreScorer
from trl_diffusion.metrics.scorer import Scorer
from trl_diffusion.revisions import resolve_revision


# CLIP's preprocessing, and the vocabulary's layout: bytes, bytes at the end of a word, and two tokens with the highest ids
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
ALPHABET = sorted(ByteLevel.alphabet())
VOCABULARY = [*ALPHABET, *(f"{byte}</w>" for byte in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1
PLACES = 77

# open_clip's model_configs/ViT-H-14.json, and a small model of the same kind
TRUE = {
    "embed_dim": 1024,
    "image_size": 224,
    "patch_size": 14,
    "vision_width": 1280,
    "vision_layers": 32,
    "vision_head_width": 80,
    "vocab_size": 49408,
    "text_width": 1024,
    "text_layers": 24,
    "text_heads": 16,
}
TINY = {
    "embed_dim": 20,
    "image_size": 28,
    "patch_size": 7,
    "vision_width": 40,
    "vision_layers": 2,
    "vision_head_width": 10,
    "vocab_size": len(VOCABULARY),
    "text_width": 24,
    "text_layers": 3,
    "text_heads": 3,
}
SIZE = TINY["image_size"]

# Different lengths, one of them too long; ASCII, so that a character is a byte
PROMPTS = ["a", "a red cat, and 2 dogs' houses", "it's 19 foxes", "long and longer " * 20, "", "A  RED\tcat"]
COSINE = 1e-5  # tolerance for cosines: rounding of float32 sums of some thousand products


def images() -> list[Image.Image]:
    """Wide, tall, transparent, gray and palette images, and images of the model's size; smooth and noisy."""
    rng = np.random.default_rng(0)
    transparent = Image.fromarray(rng.integers(0, 256, (64, 50, 3), dtype=np.uint8)).quantize(16)
    transparent.info["transparency"] = 3
    shades = np.linspace(0, 255, 60)[None, :, None] * np.linspace(1, 0.2, 41)[:, None, None] * [1, 0.6, 0.3]
    return [
        Image.fromarray(shades.astype(np.uint8)),
        Image.fromarray(rng.integers(0, 256, (95, 30, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (33, 47, 4), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (20, 31), dtype=np.uint8)),
        transparent,
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)),
    ]


def on_white(image: Image.Image) -> Image.Image:
    """What a scorer sees of an image: transparent pixels are laid on white."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    opacity = pixels[..., 3:] / 255
    return Image.fromarray((pixels[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8))


# Plain reimplementations of the published code in double precision


def token_ids(prompt: str) -> list[int]:
    """Tokenizes letter by letter, since the vocabulary has no merges; truncates and keeps the end token."""
    ids = [START]
    for word in re.findall(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+", prompt.lower()):
        ids += [VOCABULARY.index(letter) for letter in (*word[:-1], f"{word[-1]}</w>")]
    return [*ids[: PLACES - 1], END]


def plain_pixels(image: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing: resizes the shorter side with PIL's bicubic filter, crops the centre, normalizes."""
    image = image.convert("RGB")
    width, height = (SIZE * side // min(image.size) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    pixels = (pixels[top : top + SIZE, left : left + SIZE] - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)


def square_pixels(image: Image.Image) -> torch.Tensor:
    """HPS v2's preprocessing: resizes the longer side as floats with torch's antialiased bicubic filter, pads with
    black."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float64) / 255).permute(2, 0, 1)
    scale = SIZE / float(max(pixels.shape[1:]))
    height, width = (round(side * scale) for side in pixels.shape[1:])
    pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    below, right = SIZE - height, SIZE - width
    return F.pad(pixels, [right // 2, right - right // 2, below // 2, below - below // 2])


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def blocks(x: torch.Tensor, tensors: dict, prefix: str, layers: int, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """Residual attention blocks of open_clip: x has shape (length, width), the mask is added to the attention
    logits."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    for layer in range(layers):
        name = f"{prefix}transformer.resblocks.{layer}"
        inputs = norm(x, f"{name}.ln_1")
        inputs = inputs @ tensors[f"{name}.attn.in_proj_weight"].T + tensors[f"{name}.attn.in_proj_bias"]
        query, key, value = inputs.reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)  # (3, heads, length, head width)
        logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + mask
        attended = (logits.softmax(-1) @ value).permute(1, 0, 2).reshape(x.shape)
        x = x + linear(attended, f"{name}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
    return x


def embed_image(tensors: dict, pixels: torch.Tensor) -> torch.Tensor:
    """open_clip's ViT on pixels of shape (3, size, size)."""
    patches = F.conv2d(pixels[None], tensors["visual.conv1.weight"], stride=TINY["patch_size"])[0].flatten(1).T
    x = torch.cat([tensors["visual.class_embedding"][None], patches]) + tensors["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], tensors["visual.ln_pre.weight"], tensors["visual.ln_pre.bias"])
    heads = TINY["vision_width"] // TINY["vision_head_width"]
    x = blocks(x, tensors, "visual.", TINY["vision_layers"], heads, torch.zeros(1))[0]
    return (
        F.layer_norm(x, x.shape, tensors["visual.ln_post.weight"], tensors["visual.ln_post.bias"])
        @ tensors["visual.proj"]
    )


def embed_text(tensors: dict, ids: list[int]) -> torch.Tensor:
    """open_clip's text transformer: zero padding, causal attention, and the highest id as end token."""
    ids = torch.tensor(ids + [0] * (PLACES - len(ids)))
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    mask = torch.full((PLACES, PLACES), -torch.inf).triu(1)
    x = blocks(x, tensors, "", TINY["text_layers"], TINY["text_heads"], mask)
    x = F.layer_norm(x, x.shape[-1:], tensors["ln_final.weight"], tensors["ln_final.bias"])
    return x[ids.argmax()] @ tensors["text_projection"]


# The published files


def open_clip_layout(model: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file of open_clip."""

    def transformer(prefix, width, layers):
        shapes = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }
        return {
            f"{prefix}transformer.resblocks.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in shapes.items()
        }

    width, patch, text_width = model["vision_width"], model["patch_size"], model["text_width"]
    return {
        "positional_embedding": (PLACES, text_width),
        "text_projection": (text_width, model["embed_dim"]),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((model["image_size"] // patch) ** 2 + 1, width),
        "visual.proj": (width, model["embed_dim"]),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        **transformer("visual.", width, model["vision_layers"]),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
        **transformer("", text_width, model["text_layers"]),
        "token_embedding.weight": (model["vocab_size"], text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
    }


def clip_config(model: dict, **text) -> CLIPConfig:
    """The config as in config.json of the repositories on the Hub."""
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        text_config={
            "vocab_size": model["vocab_size"],
            "hidden_size": model["text_width"],
            "intermediate_size": 4 * model["text_width"],
            "num_hidden_layers": model["text_layers"],
            "num_attention_heads": model["text_heads"],
            "max_position_embeddings": PLACES,
            "hidden_act": "gelu",
            "projection_dim": model["embed_dim"],
            **text,
        },
        vision_config={
            "hidden_size": model["vision_width"],
            "intermediate_size": 4 * model["vision_width"],
            "num_hidden_layers": model["vision_layers"],
            "num_attention_heads": model["vision_width"] // model["vision_head_width"],
            "image_size": model["image_size"],
            "patch_size": model["patch_size"],
            "hidden_act": "gelu",
            "projection_dim": model["embed_dim"],
        },
    )


def random_tensors(layout: dict[str, tuple[int, ...]], seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """Weights in half precision, as published."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name, (torch.randn(shape, generator=generator) * 0.3 + bool(re.search(r"ln_\w+\.weight", name))).half())
        for name, shape in layout.items()
    )


def hps_file(folder: Path, **changes: torch.Tensor | None) -> Path:
    """A file in the format of HPS v2; `None` removes a tensor."""
    tensors = random_tensors(open_clip_layout(TINY)) | changes
    tensors = OrderedDict((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    path = folder / "HPS_v2_compressed.pt"
    torch.save({"state_dict": tensors}, path)
    return path


def doubles(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in torch.load(path)["state_dict"].items()}


HEAD = {  # names and shapes in sac+logos+ava1-l14-linearMSE.pth, where the first layer takes 768
    "layers.0.weight": (1024, TINY["embed_dim"]),
    "layers.0.bias": (1024,),
    "layers.2.weight": (128, 1024),
    "layers.2.bias": (128,),
    "layers.4.weight": (64, 128),
    "layers.4.bias": (64,),
    "layers.6.weight": (16, 64),
    "layers.6.bias": (16,),
    "layers.7.weight": (1, 16),
    "layers.7.bias": (1,),
}


def head_file(folder: Path, **changes: torch.Tensor) -> Path:
    path = folder / "aesthetic-model.pth"
    torch.save(OrderedDict(random_tensors(HEAD, seed=1)) | changes, path)
    return path


def clip_folder(folder: Path, **text) -> Path:
    """A CLIP model of transformers with its tokenizer and image processor."""
    torch.manual_seed(0)
    model = CLIPModel(clip_config(TINY, **text))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=PLACES).save_pretrained(folder)
    processor = {
        "crop_size": SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": SIZE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module", params=["legacy", "modern"])
def folder(request, tmp_path_factory) -> Path:
    """The end of a prompt is the highest id (as in configs with the wrong end token 2), or the id of the end token."""
    text = {"legacy": {"bos_token_id": 0, "eos_token_id": 2}, "modern": {"bos_token_id": START, "eos_token_id": END}}
    folder = clip_folder(tmp_path_factory.mktemp("clip"), **text[request.param])
    hps_file(folder)
    head_file(folder)
    return folder


def settings(name: str, folder: Path) -> dict[str, str]:
    """The arguments of a scorer that uses only local files."""
    return {
        "pickscore": {"model_name_or_path": str(folder), "processor_name_or_path": str(folder)},
        "clip_score": {"model_name_or_path": str(folder)},
        "hpsv2": {"weights_path": str(folder / "HPS_v2_compressed.pt"), "clip_name_or_path": str(folder)},
        "hpsv2_1": {"weights_path": str(folder / "HPS_v2_compressed.pt"), "clip_name_or_path": str(folder)},
        "aesthetic": {"weights_path": str(folder / "aesthetic-model.pth"), "clip_name_or_path": str(folder)},
    }[name] | {"device": "cpu"}


SCORERS = {
    scorer.name: scorer for scorer in (PickScoreScorer, CLIPScoreScorer, HPSv2Scorer, HPSv2_1Scorer, AestheticScorer)
}


def scorer(name: str, folder: Path) -> Scorer:
    return SCORERS[name](**settings(name, folder))


def tolerance(found: Scorer, scores: list[float]) -> float:
    return COSINE * (found.scale if isinstance(found, CosineScorer) else max(map(abs, scores)))


class TestFormulas:
    """Each score equals an independent computation of the published one, with all kinds of images and prompts in a
    batch."""

    @pytest.mark.parametrize("name", ["hpsv2", "hpsv2_1"])
    def test_hps(self, folder, name):
        """100 times the cosine similarity of open_clip's model, image by image, with open_clip's names and padding."""
        tensors = doubles(folder / "HPS_v2_compressed.pt")
        expected = [
            100
            * F.cosine_similarity(
                embed_image(tensors, normalized(square_pixels(image))), embed_text(tensors, token_ids(prompt)), dim=0
            ).item()
            for image, prompt in zip(map(on_white, images()), PROMPTS, strict=True)
        ]
        scores = scorer(name, folder).score(images(), PROMPTS).values
        assert scores == pytest.approx(expected, abs=100 * COSINE)
        assert np.std(scores) > 10  # the scores differ from each other, so the comparison is meaningful

    @pytest.mark.parametrize("name", ["pickscore", "clip_score"])
    def test_transformers(self, folder, name):
        """Cosine similarity times exp(logit scale), or times 100, pair by pair, so no prompt is padded."""
        model = CLIPModel.from_pretrained(folder)
        scale = {"pickscore": math.exp(3.0), "clip_score": 100.0}[name]
        expected = []
        for image, prompt in zip(map(on_white, images()), PROMPTS, strict=True):
            with torch.no_grad():
                outputs = model(torch.tensor([token_ids(prompt)]), plain_pixels(image)[None].float())
            expected.append(scale * (outputs.image_embeds @ outputs.text_embeds.T).item())
        scores = scorer(name, folder).score(images(), PROMPTS).values
        assert scores == pytest.approx(expected, abs=scale * COSINE)
        assert np.std(scores) > scale / 10

    def test_aesthetic(self, folder):
        """A sequence of affine layers on the normalized image embedding; the text model is removed."""
        model = CLIPModel.from_pretrained(folder)
        head = {name: tensor.double() for name, tensor in torch.load(folder / "aesthetic-model.pth").items()}
        expected = []
        for image in map(on_white, images()):
            with torch.no_grad():
                x = model.get_image_features(plain_pixels(image)[None].float()).pooler_output[0].double()
            x = x / x.square().sum().sqrt()
            for layer in (0, 2, 4, 6, 7):
                x = head[f"layers.{layer}.weight"] @ x + head[f"layers.{layer}.bias"]
            expected.append(x.item())
        found = scorer("aesthetic", folder)
        scores = found.score(images()).values
        assert scores == pytest.approx(expected, rel=COSINE)
        assert not any(name.startswith("text_model") for name in found.clip.state_dict())
        assert np.std(scores) > 0.01 * abs(np.mean(scores))

    def test_a_negative_cosine_stays_negative(self, folder, tmp_path):
        """Negating the text embeddings negates each score."""
        turned = Path(shutil.copytree(folder, tmp_path / "turned"))
        tensors = load_file(turned / "model.safetensors")
        save_file(
            tensors | {"text_projection.weight": -tensors["text_projection.weight"]}, turned / "model.safetensors"
        )
        for name in ("pickscore", "clip_score"):
            scores = [scorer(name, where).score(images(), PROMPTS).values for where in (folder, turned)]
            assert scores[1] == pytest.approx([-score for score in scores[0]], abs=100 * COSINE)


class TestOpenClip:
    def test_the_true_layout(self):
        """The tensors of open_clip's ViT-H-14 map one to one to those of the transformers model, with equal shapes."""
        layout = open_clip_layout(TRUE)
        numbers = {name: math.prod(shape) for name, shape in layout.items()}
        image = sum(number for name, number in numbers.items() if name.startswith("visual."))
        # 8 and 6 tensors outside of the blocks, 12 in each; millions of parameters as in open_clip's docs/model_profile.csv
        assert len(layout) == 8 + 32 * 12 + 6 + 24 * 12
        assert [round(number / 1e6, 2) for number in (sum(numbers.values()), image)] == [986.11, 632.08]
        with torch.device("meta"):
            converted = convert_open_clip({name: torch.empty(shape) for name, shape in layout.items()})
            expected = CLIPModel(clip_config(TRUE)).state_dict()
        assert {name: tensor.shape for name, tensor in converted.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }

    def test_a_stored_mask_is_no_weight(self, folder, tmp_path):
        """Files of old versions contain the causal mask, and give the same scores."""
        plain, masked = (
            HPSv2Scorer(hps_file(tmp_path, **changes), str(folder), "cpu").score(images(), PROMPTS)
            for changes in ({}, {"attn_mask": torch.full((PLACES, PLACES), -torch.inf).triu(1)})
        )
        assert masked == plain

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"visual.ln_post.bias": None}, "lacks vision_model.post_layernorm.bias"),
            (
                {"transformer.resblocks.1.attn.in_proj_bias": None},
                r"lacks text_model.encoder.layers.1.self_attn.k_proj.bias, .*q_proj.bias, .*v_proj.bias",
            ),
            ({"score_predictor.weight": torch.zeros(2)}, "has the unexpected tensors score_predictor.weight"),
            (
                {"visual.transformer.resblocks.2.ln_1.bias": torch.zeros(40)},
                "has the unexpected tensors vision_model.encoder.layers.2.",
            ),
            ({"visual.proj": torch.zeros(40, 21)}, "has other shapes for visual_projection.weight"),
            (
                {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(40, 40)},
                r"layers.0.self_attn.k_proj",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, folder, tmp_path, changes, message):
        """A missing, unexpected or misshapen tensor raises a ValueError with the file and the tensor."""
        path = hps_file(tmp_path, **changes)
        with pytest.raises(ValueError, match=message) as caught:
            HPSv2Scorer(path, str(folder), "cpu")
        assert str(path) in str(caught.value)


class TestPreprocessing:
    @pytest.mark.parametrize("image", images(), ids=["wide", "tall", "RGBA", "gray", "palette", "just right"])
    def test_pixels(self, folder, image):
        """CLIP crops the centre, HPS v2 fits the whole image; both ignore transparency and normalize with CLIP's
        values."""
        for name, expected, tolerance in (
            ("pickscore", plain_pixels(image), 1e-6),
            ("clip_score", plain_pixels(image), 1e-6),
            ("aesthetic", plain_pixels(image), 1e-6),
            ("hpsv2", normalized(square_pixels(image)), 1e-4),  # float32 sums over a hundred pixels in another order
        ):
            pixels = scorer(name, folder).prepare(image)
            assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.float32
            assert (pixels - expected).abs().max() < tolerance

    def test_the_whole_image_fits(self):
        """White stays white between black bars, an odd row or column of padding is at the end, and thin images stay
        thin."""
        for size, rows, columns in (
            ((40, 21), slice(6, 21), slice(0, 28)),  # 28 x 14.7
            ((10, 40), slice(0, 28), slice(10, 17)),  # 7 x 28
            ((1, 400), slice(0, 28), slice(13, 14)),  # 0.07 x 28
        ):
            expected = torch.zeros(3, 28, 28)
            expected[:, rows, columns] = 1
            assert torch.allclose(fit_into_square(Image.new("RGB", size, "white"), 28), expected, atol=1e-6)

    def test_what_interpolation_overshoots_is_kept(self):
        """At the edge of black and white, values go below 0 and above 1, as for resized floats."""
        image = Image.new("RGB", (20, 20), "white")
        image.paste("black", (0, 0, 10, 20))
        pixels = fit_into_square(image, 28)
        assert pixels.min() < -0.02 and pixels.max() > 1.02

    def test_prompts_are_cleaned_as_by_open_clip(self, folder):
        """HPS v2 straightens curly quotes and unescapes HTML twice; PickScore does not change texts."""
        assert clean_prompt("the cat’s “hat” &amp;amp; &lt;i&gt;") == 'the cat\'s "hat" & <i>'
        hps, pick = scorer("hpsv2", folder), scorer("pickscore", folder)
        ids = [
            [tokens["input_ids"].tolist() for tokens in (each.tokenize(["cat&#39;s"]), each.tokenize(["cat's"]))]
            for each in (hps, pick)
        ]
        assert ids[0][0] == ids[0][1] == [token_ids("cat's")] and ids[1][0] == [token_ids("cat&#39;s")]


@pytest.mark.parametrize("name", SCORERS)
def test_scores_depend_on_nothing_else(folder, name):
    """Scores do not depend on batch size, other images in the batch, order or repetition."""
    found = scorer(name, folder)
    scores = found.score(images(), PROMPTS, batch_size=6).values
    for size in (1, 4):
        assert found.score(images(), PROMPTS, batch_size=size).values == pytest.approx(
            scores, abs=tolerance(found, scores)
        )
    turned = found.score(images()[::-1], PROMPTS[::-1], batch_size=4).values[::-1]
    assert turned == pytest.approx(scores, abs=tolerance(found, scores))
    assert found.score(images(), PROMPTS, batch_size=6).values == scores


@pytest.mark.parametrize("name", SCORERS)
def test_evaluate_loads_it(folder, name, tmp_path, monkeypatch):
    """The module of `evaluate` returns the scorer's scores for files and images in memory, and loads the model
    once."""
    loaded = []
    make = CLIPModel.__init__
    monkeypatch.setattr(
        CLIPModel, "__init__", lambda self, *args, **more: (loaded.append(1), make(self, *args, **more))[0]
    )
    files = [tmp_path / f"{index}.png" for index in range(len(PROMPTS))]
    for file, image in zip(files, images(), strict=True):
        image.save(file)
    needs_prompts = SCORERS[name].needs_prompts
    prompts = {"prompts": PROMPTS} if needs_prompts else {}
    metric = evaluate.load(metric_path(name), cache_dir=str(tmp_path / "cache"), **settings(name, folder))
    assert set(metric.features) == {"images", *prompts} and metric.citation
    assert not loaded  # nothing is loaded before the first images
    results = [
        metric.compute(images=[str(file) for file in files], **prompts),
        # `datasets` stores a palette in memory as TIFF, without its transparency
        metric.compute(images=[on_white(x) if x.mode == "P" else x for x in images()], **prompts, batch_size=5),
    ]
    assert len(loaded) == 1
    found = scorer(name, folder)
    scores = found.score(images(), PROMPTS)
    assert (
        results[0]
        == found.result(scores)
        == {
            name: np.mean(scores.values),
            "standard_error": pytest.approx(np.std(scores.values, ddof=1) / math.sqrt(len(PROMPTS))),
            "scores": scores.values,
            "errors": {},
            "higher_is_better": True,
            "weights": found.weights,
        }
    )
    assert results[1]["scores"] == pytest.approx(scores.values, abs=tolerance(found, scores.values))


class TestWeights:
    """Which weights are loaded, how they are described, and the errors for missing ones."""

    @pytest.fixture
    def hub(self, folder, tmp_path, monkeypatch) -> Path:
        """A Hub cache with all published files; the commit of a repository is its index."""
        cache = tmp_path / "hub"
        contents = {
            "yuvalkirstain/PickScore_v1": ["config.json", "model.safetensors"],
            VIT_H_14: [
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "preprocessor_config.json",
            ],
            "xswu/HPSv2": ["HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"],
            "openai/clip-vit-large-patch14": ["config.json", "model.safetensors", "preprocessor_config.json"],
            "trl-lib/ddpo-aesthetic-predictor": ["aesthetic-model.pth"],
        }
        for place, (repo_id, files) in enumerate(contents.items()):
            repository = cache / f"models--{repo_id.replace('/', '--')}"
            snapshot = repository / "snapshots" / (str(place) * 40)
            snapshot.mkdir(parents=True)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(snapshot.name)
            for file in files:
                shutil.copy(folder / file.replace("v2.1", "v2"), snapshot / file)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        return cache

    @pytest.mark.parametrize(
        "name, weights",
        {
            "pickscore": {"yuvalkirstain/PickScore_v1": "0", VIT_H_14: "1"},
            "clip_score": {VIT_H_14: "1"},
            "hpsv2": {"xswu/HPSv2/HPS_v2_compressed.pt": "2", VIT_H_14: "1"},
            "hpsv2_1": {"xswu/HPSv2/HPS_v2.1_compressed.pt": "2", VIT_H_14: "1"},
            "aesthetic": {
                "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth": "4",
                "openai/clip-vit-large-patch14": "3",
            },
        }.items(),
    )
    def test_what_is_published_is_the_default(self, folder, hub, name, weights):
        """Without arguments, a scorer loads the published files and reports their commits."""
        found = SCORERS[name](device="cpu")
        assert found.weights == {name: 40 * commit for name, commit in weights.items()}
        assert found.score(images(), PROMPTS) == scorer(name, folder).score(images(), PROMPTS)

    @pytest.mark.parametrize("name", SCORERS)
    def test_what_is_told_is_what_is_read(self, hub, name, monkeypatch):
        """Everything is loaded at the reported commits, even if branches change in the meantime."""

        def resolve_and_move_on(repo_id: str) -> str:
            commit = resolve_revision(repo_id)
            (hub / f"models--{repo_id.replace('/', '--')}" / "refs" / "main").write_text("9" * 40)
            return commit

        for module in (clip, hpsv2, pickscore):
            monkeypatch.setattr(module, "resolve_revision", resolve_and_move_on)
        assert "9" * 40 not in SCORERS[name](device="cpu").weights.values()

    def test_files_of_ones_own_are_told_by_their_digest(self, folder):
        """A file or folder is listed by its path with a hash of its content."""
        for name in SCORERS:
            found = scorer(name, folder)
            assert set(found.weights) == {value for key, value in settings(name, folder).items() if key != "device"}
            assert all(re.fullmatch("sha256:[0-9a-f]{16}", revision) for revision in found.weights.values())

    @pytest.mark.parametrize(
        "name, repo_id, file, said",
        [
            ("hpsv2", "xswu/HPSv2", "HPS_v2_compressed.pt", "HPS_v2_compressed.pt"),
            ("hpsv2_1", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.pt"),
            ("hpsv2", VIT_H_14, "tokenizer.json", "tokenizer"),
            ("hpsv2", VIT_H_14, "preprocessor_config.json", "preprocessor_config.json"),
            ("aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "aesthetic-model.pth"),
            ("aesthetic", "openai/clip-vit-large-patch14", "model.safetensors", "model.safetensors"),
            ("aesthetic", "openai/clip-vit-large-patch14", "preprocessor_config.json", "preprocessor_config.json"),
            ("pickscore", "yuvalkirstain/PickScore_v1", "model.safetensors", "model.safetensors"),
            ("pickscore", VIT_H_14, "tokenizer.json", "tokenizer"),
            ("clip_score", VIT_H_14, "model.safetensors", "model.safetensors"),
        ],
    )
    def test_files_that_are_not_there(self, hub, name, repo_id, file, said):
        """Without network, a missing file raises a one-line ValueError with the file, the repository and the
        command."""
        next(hub.rglob(f"models--{repo_id.replace('/', '--')}/snapshots/*/{file}")).unlink()
        with pytest.raises(ValueError, match=f"`hf download {repo_id}") as caught:
            SCORERS[name](device="cpu")
        assert said in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", SCORERS)
    def test_a_folder_without_config(self, folder, tmp_path, name):
        """It raises a ValueError with the folder."""
        changed = Path(shutil.copytree(folder, tmp_path / "changed"))
        (changed / "config.json").unlink()
        with pytest.raises(ValueError, match=f"{changed}"):
            scorer(name, changed)

    def test_another_models_tokenizer(self, folder, tmp_path):
        """A tokenizer with fewer tokens than the model raises a ValueError with both numbers."""
        CLIPTokenizer(vocab={token: index for index, token in enumerate(VOCABULARY[256:])}, merges=[]).save_pretrained(
            tmp_path
        )
        shutil.copy(folder / "config.json", tmp_path)
        shutil.copy(folder / "preprocessor_config.json", tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path} has 258 tokens, but the model has 514"):
            PickScoreScorer(str(folder), str(tmp_path), "cpu")

    @pytest.mark.parametrize(
        "changes, tensor",
        [
            ({"visual_projection.weight": None}, "visual_projection.weight"),
            ({"text_model.extra.weight": torch.zeros(2)}, "text_model.extra.weight"),
            ({"text_projection.weight": torch.zeros(20, 25)}, "text_projection.weight"),
        ],
    )
    @pytest.mark.parametrize("name", ["pickscore", "clip_score", "aesthetic"])
    def test_a_clip_whose_tensors_do_not_fit(self, folder, tmp_path, name, changes, tensor):
        """A missing, unexpected or misshapen CLIP tensor raises a ValueError with folder and tensor, and is not
        initialized."""
        changed = Path(shutil.copytree(folder, tmp_path / "changed"))
        tensors = load_file(changed / "model.safetensors") | changes
        save_file({name: value for name, value in tensors.items() if value is not None}, changed / "model.safetensors")
        with pytest.raises(ValueError, match=f"{changed} do not fit its config.json.* another shape: {tensor}"):
            scorer(name, changed)

    def test_positions_in_old_files_are_no_weights(self, folder, tmp_path):
        """The published files contain position ids, and load like files without them."""
        changed = Path(shutil.copytree(folder, tmp_path / "changed"))
        tensors = load_file(changed / "model.safetensors")
        tensors["text_model.embeddings.position_ids"] = torch.arange(PLACES)[None]
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(tensors, changed / "model.safetensors")
        scores = [scorer("pickscore", where).score(images(), PROMPTS) for where in (folder, changed)]
        assert scores[0] == scores[1]

    def test_a_broken_clip(self, folder, tmp_path):
        """A truncated file raises a ValueError with the folder."""
        changed = Path(shutil.copytree(folder, tmp_path / "changed"))
        content = (changed / "model.safetensors").read_bytes()
        (changed / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{changed} cannot be read"):
            scorer("pickscore", changed)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"layers.0.weight": torch.zeros(1024, 768)}, "has other shapes for layers.0.weight"),
            ({"layers.8.bias": torch.zeros(1)}, "has the unexpected tensors layers.8.bias"),
        ],
    )
    def test_a_head_that_does_not_fit(self, folder, tmp_path, changes, message):
        """An unexpected or misshapen tensor, as in a head for another CLIP, raises a ValueError with file and
        tensor."""
        path = head_file(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"{path} .*{message}"):
            AestheticScorer(path, str(folder), "cpu")

    @pytest.mark.parametrize("name", ["hpsv2", "aesthetic"])
    def test_damaged_weights(self, folder, tmp_path, name):
        """A score that is not a number raises a ValueError with the image and the weights."""
        nan = torch.tensor(torch.nan)
        path = {
            "hpsv2": hps_file(tmp_path, **{"visual.proj": nan.expand(40, 20).clone()}),
            "aesthetic": head_file(tmp_path, **{"layers.7.bias": nan[None]}),
        }[name]
        image = tmp_path / "image.png"
        images()[0].save(image)
        with pytest.raises(ValueError, match=f"`{name}` of image 0 {image} is nan: the weights .*{path}"):
            SCORERS[name](path, str(folder), "cpu").score([image], PROMPTS[:1])


@pytest.mark.parametrize("name", SCORERS)
def test_bad_input(folder, name, tmp_path):
    """No images, too few prompts, and a file that is not an image raise a ValueError with the number or the file."""
    found = scorer(name, folder)
    with pytest.raises(ValueError, match=f"no images to compute `{name}`"):
        found.score([], [])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{broken} cannot be read"):
        found.score([images()[0], broken], PROMPTS[:2])
    if found.needs_prompts:
        with pytest.raises(ValueError, match="there are 6 images and 2 prompts"):
            found.score(images(), PROMPTS[:2])
