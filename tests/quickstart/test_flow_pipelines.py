# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from examples.tiny_pipelines import make_flow_pipeline
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.paintings import ATTRIBUTES, inspect_painting, sample_painting
from trl_diffusion.quickstart.sampling import generate, load_pipeline, shipped
from trl_diffusion.quickstart.world import evaluation_prompts, inspect_image


WORLDS = ("scenes", "paintings")
PROMPTS = {"scenes": "a red circle and a blue square", "paintings": "a red circle"}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def folder_of(world: str, kind: str = "flow") -> Path:
    return Path(shipped(getattr(MODELS[kind], world)))


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(world):
    pipeline = load_pipeline(folder_of(world).name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return make_flow_pipeline.encode(pipeline, prompts)


class TestBases:
    def test_folder_is_small_and_holds_no_code(self, world):
        """The shipped folder is at most 6 MB, its weights are safetensors, and all else is JSON."""
        files = [file for file in folder_of(world).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 6_000_000
        assert {file.suffix for file in files} == {".json", ".safetensors"}

    def test_the_vae_is_the_one_of_the_unet(self, world, pipeline):
        """Both kinds of model have the same latents, but for the shift that only this pipeline asks for, and it is none."""
        other = AutoencoderKL.from_pretrained(folder_of(world, "unet"), subfolder="vae", dtype=torch.float32)
        assert pipeline.vae.config.shift_factor == 0
        assert pipeline.vae.config.scaling_factor == other.config.scaling_factor
        assert all(torch.equal(*pair) for pair in zip(pipeline.vae.parameters(), other.parameters(), strict=True))

    def test_every_word_is_a_token(self, world, pipeline):
        """For T5 each word and each comma is one token, and the longest prompt fits; for CLIP its caption is."""
        words = ["", *(pair[0] for pair in ATTRIBUTES.values())] if world == "paintings" else [""]
        prompt = PROMPTS[world] + ", ".join(words)
        ids = pipeline.tokenizer_3(prompt).input_ids
        tokens = [token.removeprefix("▁") for token in pipeline.tokenizer_3.convert_ids_to_tokens(ids)]
        assert tokens[:-1] == prompt.replace(",", " ,").split()
        assert len(ids) <= MODELS["flow"].conditions["max_sequence_length"]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            ids = tokenizer(PROMPTS[world]).input_ids
            tokens = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
            assert tokens[1:-1] == PROMPTS[world].split() and len(ids) <= tokenizer.model_max_length

    def test_what_it_does_not_know_is_one_unknown_token(self, pipeline):
        """Another word, or a character that is in no word, is read as unknown, and the words around it as they are."""
        ids = pipeline.tokenizer_3("a red hexagon € circle").input_ids
        tokens = pipeline.tokenizer_3.convert_ids_to_tokens(ids)
        assert [token for token in tokens if token not in ("▁", "<unk>")] == ["▁a", "▁red", "▁circle", "</s>"]
        assert encode(pipeline, ["a red hexagon € circle"])[0].isfinite().all()

    def test_draws_what_the_prompt_names(self, world, pipeline):
        """The base draws what it is asked for, and each defect or negative quality neither always nor never."""
        if world == "scenes":
            prompts = evaluation_prompts(64, seed=0)
            findings = [
                inspect_image(*both) for both in zip(generate(pipeline, prompts, seed=0), prompts, strict=True)
            ]
            match, clean = (
                np.mean([[getattr(finding, name) for finding in pair] for pair in findings], axis=0)
                for name in ("match", "clean")
            )
            assert (match >= 0.93).all()
            assert (0.3 <= clean).all() and (clean <= 0.85).all()
        else:
            prompts = evaluation_prompts(64, 0, sample_painting)
            findings = [
                inspect_painting(*both) for both in zip(generate(pipeline, prompts, seed=0), prompts, strict=True)
            ]
            negatives = np.array(
                [[name in finding.negative_attributes for name in ATTRIBUTES] for finding in findings]
            )
            assert np.mean([finding.match for finding in findings]) >= 0.93
            assert 1.4 <= negatives.sum(1).mean() <= 2.4
            assert (negatives.mean(0) > 0.1).all() and (negatives.mean(0) < 0.9).all()


def test_attribute_words_are_told_apart():
    """What the encoders say of the words that no caption had differs as much as what they say of red and blue."""
    pipeline = load_pipeline(MODELS["flow"].paintings)
    words = [positive for positive, _ in ATTRIBUTES.values()]
    others = [[negative if word == positive else word for word in words] for positive, negative in ATTRIBUTES.values()]
    prompts = [", ".join(["a red circle", *words]), ", ".join(["a blue circle", *words])]
    prompts += [", ".join(["a red circle", *each]) for each in others]
    states = encode(pipeline, prompts)[0][:, make_flow_pipeline.CLIP_LENGTH :]  # of T5
    changes = (states - states[0]).norm(dim=(1, 2))[1:]
    assert (changes[1:] > 0.7 * changes[0]).all()


def test_the_script_runs_and_repeats_itself(tmp_path, monkeypatch):
    """The same seed and number of steps give the same weights, of the shapes and with the words that are shipped."""
    made = []
    for name in ("first", "second"):
        flags = ["--num_scenes", "64", "--num_steps", "3", "--num_samples", "0", "--world", "paintings"]
        monkeypatch.setattr("sys.argv", ["make_flow_pipeline", "--output_dir", str(tmp_path / name), *flags])
        make_flow_pipeline.main()
        made.append(StableDiffusion3Pipeline.from_pretrained(tmp_path / name, local_files_only=True))
    ours = load_pipeline(MODELS["flow"].paintings)
    for name in ("transformer", "vae", *ENCODERS):
        first, second, theirs = (getattr(each, name).state_dict() for each in (*made, ours))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert {key: value.shape for key, value in first.items()} == {
            key: value.shape for key, value in theirs.items()
        }
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert getattr(made[0], name).get_vocab() == getattr(ours, name).get_vocab()
