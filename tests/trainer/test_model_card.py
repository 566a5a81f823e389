# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of each family: its code runs as printed on what was saved, and its settings are those of the run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from tests import tiny
from tests.original_layouts import sd_file
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.cards.facts import EvaluationFacts, Score, read_model_facts, write_facts


FAMILIES = {
    "sd": tiny.sd_pipeline,
    "sdxl": tiny.sdxl_pipeline,
    "sd3": tiny.sd3_pipeline,
    "sd3 without T5": lambda: tiny.sd3_pipeline(has_t5=False),
    "flux": tiny.flux_pipeline,
    "schnell": lambda: tiny.flux_pipeline(guidance_embeds=False),
}


def make_trainer(tmp_path: Path, family: str, is_lora: bool, **settings) -> InstanceDPOTrainer:
    if family in ("sd3", "flux", "schnell"):
        settings = {"max_sequence_length": 16} | settings
    args = InstanceDPOConfig(str(tmp_path / "out"), resolution=32, num_inference_steps=2, **tiny.FAST | settings)
    pipeline = FAMILIES[family]()
    pipeline.register_to_config(_name_or_path="user/base")
    return InstanceDPOTrainer(
        pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora() if is_lora else None
    )


def code_of(card: ModelCard) -> str:
    return card.text.split("```python")[1].split("```")[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "reversed lora", "full"])
def test_the_code_of_a_card_samples_what_the_trainer_samples(tmp_path, family, kind):
    """As printed but for the device, the precision, the number of steps and the noise: the same image as `trainer.sample`."""
    trainer = make_trainer(tmp_path, family, kind != "full", reverse_preference=kind == "reversed lora")
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    code = code_of(ModelCard.load(tmp_path / "out" / "README.md"))
    flow = family not in ("sd", "sdxl")
    for printed, here in (
        ('"user/base"', repr(str(tmp_path / "base"))),
        ('"out"', repr(str(tmp_path / "out"))),
        (f"torch.{'bfloat16' if flow else 'float16'}", "torch.float32"),
        ('.to("cuda")', ""),
        ("width=32", "width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0)"),
    ):
        assert printed in code or printed == ('"user/base"' if kind == "full" else "")
        code = code.replace(printed, here)
    scope = {"torch": torch}
    exec(code, scope)
    image = np.asarray(scope["image"]).astype(int)
    assert image.shape == (32, 32, 3)
    if kind == "reversed lora":
        return  # guided by it, and not sampled from it
    pipeline = trainer.backbone.pipeline
    with trainer.backbone.sampling_with(trainer.accelerator.unwrap_model(trainer.model)):
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, **trainer.backbone.sampling_settings}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        expected = pipeline(trainer._example_prompt, generator=generator, **settings).images[0]
    assert abs(image - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_settings_of_flow_models(tmp_path, family):
    """They are on the card where they were set, with one sentence on beta; a card of Stable Diffusion has none of it."""
    settings = {"timestep_density": "logit_normal", "logit_mean": 0.5}
    settings |= {"embedded_guidance": 2.0} if family == "flux" else {}
    text = {}
    for name, trainer in (
        ("set", make_trainer(tmp_path, family, True, **settings)),
        ("left out", make_trainer(tmp_path, family, True, max_sequence_length=None)),
        ("sd", make_trainer(tmp_path, "sd", True)),
    ):
        trainer.create_model_card()
        text[name] = ModelCard.load(tmp_path / "out" / "README.md").text
    rows = ["timestep_density | logit_normal", "logit_mean | 0.5", "logit_std | 1.0", "max_sequence_length | 16"]
    for row in [*rows, *(["embedded_guidance | 2.0"] if family == "flux" else [])]:
        assert f"| {row} |" in text["set"]
    assert "mode_scale" not in text["set"]
    for name in ("left out", "sd"):
        assert not any(row.split(" |")[0] in text[name] for row in [*rows, "embedded_guidance"])
    assert ["errors of the velocity" in text[name] for name in text] == [True, True, False]


def fuse(pipeline):
    pipeline.load_lora_weights(lora_layers())
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def lora_layers() -> dict[str, torch.Tensor]:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}


def invert(pipeline):
    pipeline.load_textual_inversion({"<style>": torch.ones(16)})


def swap(pipeline):
    pipeline.unet = tiny.sd_pipeline(seed=1).unet


@pytest.mark.parametrize("is_lora", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda pipeline: None, ""),
        (fuse, "a LoRA fused into it"),
        (swap, "another unet"),
        (invert, "textual inversions loaded into it"),
        (
            lambda pipeline: (fuse(pipeline), invert(pipeline)),
            "a LoRA fused into it and textual inversions loaded into it",
        ),
    ],
    ids=["as it is", "fused", "swapped", "inversion", "two changes"],
)
def test_a_base_that_was_changed(tmp_path, change, named, is_lora):
    """It is named so, and a LoRA on it has no `base_model` in its metadata, by which the plain base would be loaded for it."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.register_to_config(_name_or_path="user/base")
    change(pipeline)
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST)
    lora = tiny.lora() if is_lora else None
    trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=lora)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    relation = (None, None) if named and is_lora else ("user/base", "adapter" if is_lora else "finetune")
    assert (card.data.to_dict().get("base_model"), card.data.to_dict().get("base_model_relation")) == relation
    head = "on [user/base](https://huggingface.co/user/base)" + (f" with {named}." if named else ".")
    assert head in card.text
    assert (f"# The base was trained with {named}:" in card.text) == (is_lora and named != "")
    assert str(tmp_path) not in card.text


def test_the_lora_that_a_training_started_at(tmp_path):
    """A Hub id is named, a folder of this machine is not; how to use it elsewhere is said of a LoRA alone."""
    make_trainer(tmp_path, "sd", is_lora=True).save_model(str(tmp_path / "lora"))
    trainer = make_trainer(tmp_path, "sd", is_lora=False, initial_lora=str(tmp_path / "lora"))
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "The training started at another LoRA, which is not published." in text and str(tmp_path) not in text
    assert "trl-diffusion export-lora out --output" in text
    trainer.args.initial_lora = "user/lora"
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "The training started at [user/lora](https://huggingface.co/user/lora)." in text
    full = make_trainer(tmp_path / "full", "sd", is_lora=False)
    full.create_model_card()
    text = ModelCard.load(tmp_path / "full" / "out" / "README.md").text
    assert "started at" not in text and "export-lora" not in text


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A folder with a base as a folder and as a file, and the Hub's cache with both."""
    root = tmp_path_factory.mktemp("bases")
    snapshot = root / "hub" / "models--user--base" / "snapshots" / COMMIT
    tiny.sd_pipeline().save_pretrained(root / "my base")
    save_file(sd_file(), root / "base.safetensors")
    shutil.copytree(root / "my base", snapshot)
    save_file(sd_file(), snapshot / "sd.safetensors")
    return root


@pytest.mark.parametrize(
    ("where", "named", "said", "loaded"),
    [
        ("my base", ("", "", "", "my base"), "on a base that is not on the Hub (`my base`)", 'from_pretrained("my base", '),
        ("base.safetensors", ("", "", "", "base.safetensors"), "(`base.safetensors`)", 'from_single_file("base.safetensors", '),
        (f"hub/models--user--base/snapshots/{COMMIT}", ("user/base", COMMIT, "", ""), f"tree/{COMMIT}", 'from_pretrained("user/base", '),
        (
            f"hub/models--user--base/snapshots/{COMMIT}/sd.safetensors",
            ("user/base", COMMIT, "sd.safetensors", ""),
            "file `sd.safetensors`",
            f'from_single_file("https://huggingface.co/user/base/blob/{COMMIT}/sd.safetensors", ',
        ),
    ],
    ids=["folder", "file", "cached", "cached file"],
)  # fmt: skip
def test_how_a_base_is_named(bases, tmp_path, where, named, said, loaded):
    """By the Hub id and the commit where it is out of the cache, else by the last part of its path, and the code loads what it is."""
    settings = {"config": str(bases / "my base")} if where.endswith("safetensors") else {}
    args = InstanceDPOConfig(str(tmp_path / "out"), resolution=32, model_init_kwargs=settings, **tiny.FAST)
    trainer = InstanceDPOTrainer(str(bases / where), args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora())
    trainer.create_model_card()
    facts = read_model_facts(tmp_path / "out" / "training.json")
    assert (facts.base, facts.base_revision, facts.base_file, facts.base_folder) == tuple(x or None for x in named)
    text = (tmp_path / "out" / "README.md").read_text()
    assert said in text and loaded in code_of(ModelCard(text))
    assert facts.base_changes == [] and ModelCard(text).data.base_model == (named[0] or None)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in files if str(bases).encode() in file.read_bytes()]


@pytest.mark.parametrize("is_lora", [True, False])
def test_the_code_runs_as_it_stands_beside_what_it_names(bases, tmp_path, monkeypatch, is_lora):
    """In a folder with base and model, of a base that is not on the Hub: but for the device and its precision, as printed."""
    args = InstanceDPOConfig(str(tmp_path / "out"), resolution=32, **tiny.FAST)
    lora = tiny.lora() if is_lora else None
    trainer = InstanceDPOTrainer(str(bases / "my base"), args=args, train_dataset=tiny.pairs(2), peft_config=lora)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    shutil.copytree(bases / "my base", tmp_path / "my base")
    monkeypatch.chdir(tmp_path)
    text, scope = (tmp_path / "out" / "README.md").read_text(), {}
    blocks = [part.split("```")[0] for part in text.split("```python")[1:]]
    assert len(blocks) == 1 + is_lora
    for block in blocks:
        exec(block.replace('.to("cuda")', "").replace("torch.float16", "torch.float32"), scope)
    assert scope["image"].size == (32, 32)
    if not is_lora:
        return
    # The second block: the LoRA at another scale, then in the weights
    merged = scope["pipeline"].unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    base = tiny.sd_pipeline().unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    update = merged.lora_B["default_0"].weight @ merged.lora_A["default_0"].weight
    assert update.abs().max() > 0
    torch.testing.assert_close(merged.base_layer.weight, base.weight + 0.8 * update, atol=1e-6, rtol=1e-5)


def test_the_files_of_a_card(tmp_path):
    """Card, facts and recipe; each made again is the same, and an evaluation that lies beside them stays in the card."""
    trainer = make_trainer(tmp_path, "sd", is_lora=True)
    trainer.create_model_card("a name", "user/pairs", "mine")
    folder = tmp_path / "out"
    assert {file.name for file in folder.iterdir()} >= {"README.md", "training.json", "training.yaml"}
    first = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    facts = read_model_facts(folder / "training.json")
    assert (facts.name, facts.model_id, facts.data.name, facts.tags[-1]) == ("a name", "out", "user/pairs", "mine")
    assert yaml.safe_load(first["training.yaml"]) == facts.recipe == json.loads(first["training.json"])["recipe"]
    evaluation = EvaluationFacts(
        *("out", {"base": "the base", "out": "a LoRA"}, None),
        {"pickscore": {"label": "PickScore", "higher_is_better": True, "weights": {}, "full_names": []}},
        {"base": {"pickscore": Score(20.0)}, "out": {"pickscore": Score(21.5)}},
        {"out": {"pickscore": Score(0.75)}},
        {"source": "parti", "number": 8, "images": {"base": 8, "out": 8}},
        {"seed": 0},
    )
    write_facts(evaluation, folder / "evaluation.json")
    trainer.create_model_card("a name", "user/pairs", "mine")
    card = ModelCard.load(folder / "README.md")
    assert "### Scores" in card.text and "Nothing was measured" not in card.text
    assert 21.5 in [result.metric_value for result in card.data.eval_results]
    (folder / "evaluation.json").unlink()
    trainer.create_model_card("a name", "user/pairs", "mine")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == first


def test_an_evaluation_of_earlier_weights_does_not_stay(tmp_path, caplog):
    """A training changes the weights, so that its card does not show what the ones before it scored."""
    trainer = make_trainer(tmp_path, "sd", True)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    trainer.train()
    assert (
        not (tmp_path / "out" / "evaluation.json").exists()
        and "was of the weights before this training" in caplog.text
    )
    trainer.create_model_card()
    assert "Nothing was measured" in ModelCard.load(tmp_path / "out" / "README.md").text


def test_a_dora_is_offered_to_no_other_program(tmp_path):
    """Files for ComfyUI and A1111 cannot hold it, so that its card names none."""
    args = InstanceDPOConfig(str(tmp_path / "out"), resolution=32, **tiny.FAST)
    pairs, lora = tiny.pairs(4), tiny.lora()
    lora.use_dora = True
    InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=pairs, peft_config=lora).create_model_card()
    assert "comfyui" not in ModelCard.load(tmp_path / "out" / "README.md").text.lower()


def test_the_model_that_drew_the_samples(bases, tmp_path):
    """A distilled sibling on the Hub is a second way to use a LoRA, with its own steps and guidance; one of this machine is not named."""
    sibling, settings = str(bases / "my base"), {"num_inference_steps": 2, "guidance_scale": 1.5}
    args = InstanceDPOConfig(
        str(tmp_path / "out"), resolution=32, sample_model=sibling, sample_prompts=["a cat"], **settings, **tiny.FAST
    )
    trainer = InstanceDPOTrainer(sibling, args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora())
    trainer.save_model()
    trainer.create_model_card()
    assert "which drew the samples" not in (tmp_path / "out" / "README.md").read_text()
    trainer.args.sample_model = "user/turbo"
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "With [user/turbo](https://huggingface.co/user/turbo), which drew the samples of the training:" in text
    code = text.split("```python")[3].split("```")[0]
    assert "height=32, width=32, num_inference_steps=2, guidance_scale=1.5" in code
    for printed, here in (
        ("user/turbo", sibling),
        ('"out"', repr(str(tmp_path / "out"))),
        ('.to("cuda")', ""),
        ("float16", "float32"),
    ):
        assert printed in code
        code = code.replace(printed, here)
    scope = {}
    exec(code, scope)
    assert scope["image"].size == (32, 32)
