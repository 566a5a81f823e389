# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the documentation says is there: its Python runs, its flags parse, its links, names, metrics and messages exist."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image

import trl_diffusion
from tests import tiny
from tests.evaluation.loras import save_lora
from tests.metrics.test_clip_scorers import clip_folder
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    Criteria,
    DDSPOConfig,
    DDSPOTrainer,
    DiffusionKTOConfig,
    InstanceDPOConfig,
    attribute_features,
    unpair_pairs,
)
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run as annotate
from trl_diffusion.annotation.run import run_locally
from trl_diffusion.backbones.quantization import read_quantization
from trl_diffusion.cli.main import COMMANDS, LAUNCHED_COMMANDS, script_of
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.data.collators import AttributeCollator, InstancePairCollator
from trl_diffusion.data.formats import check_attribute_columns, prepare_dataset
from trl_diffusion.evaluation.protocols import load_protocol, shipped_protocols
from trl_diffusion.losses import (
    PAIR_LOSSES,
    PairErrors,
    PairSettings,
    complex_po_loss,
    diffusion_kto_loss,
    reflected_target,
)
from trl_diffusion.masks import unpacked
from trl_diffusion.metrics import METRICS
from trl_diffusion.metrics.scorer import open_image
from trl_diffusion.noising import per_sample_errors
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM
from trl_diffusion.quickstart.world import preference_dataset
from trl_diffusion.segmentation import decode_rle


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "source"
# The log holds commands of past commits, which need not run today.
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "log.md")
README = "../../README.md"
COLUMNS = ("prompt", "chosen", "rejected")
CONFIGS = (InstanceDPOConfig, AttributeSFTConfig, ComplexPOConfig, DDSPOConfig, DiffusionKTOConfig)


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def section(page: str, heading: str) -> str:
    """What stands between a heading and the next of its level or above, without code blocks."""
    level = re.search(rf"^(#+) {heading}$", prose(page), re.MULTILINE)[1]
    found = re.search(rf"^{level} {heading}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", prose(page), re.DOTALL | re.MULTILINE)
    return found[1]


def parsers(command: str) -> list:
    """The parsers that read the flags of a command: its own, and the launcher's for a command that it starts."""
    own = script_of(command).make_parser(prog=command)
    launcher = launch_command_parser()
    launcher.add_argument("--accelerate_config")
    return [own, launcher] if command in LAUNCHED_COMMANDS else [own]


def flags_of(command: str) -> set[str]:
    return {flag for parser in parsers(command) for action in parser._actions for flag in action.option_strings}


# ---- Python ----


@functools.cache
def painting() -> Criteria:
    """The shipped tree."""
    return Criteria.load("painting")


def paintings(num_rows: int) -> datasets.Dataset:
    """Tiny paintings with attributes of the shipped tree, which the pages use."""
    ids = [painting().select(dimension)[0].id for dimension in painting().dimensions]
    shipped = dict(zip(("hue", "kind", "pet"), ids))

    def rename(row):
        return {name: [shipped[attribute] for attribute in row[name]] for name in row if name.endswith("_attributes")}

    return tiny.paintings(num_rows).map(rename)


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch):
    """
    The Hub holds tiny pipelines, pairs, paintings and an expert; a training is one step, and one more where it resumes;
    everything is written to an empty folder.
    """
    folder = tmp_path / "pages"
    folder.mkdir()
    monkeypatch.chdir(folder)
    load_dataset, load_pipeline = datasets.load_dataset, diffusers.DiffusionPipeline.from_pretrained
    read_config = diffusers.DiffusionPipeline.load_config
    uploads = []

    def load_tiny_dataset(path, *args, split, streaming=False, **kwargs):
        if path == "imagefolder":
            return load_dataset(path, *args, split=split, cache_dir=str(tmp_path / "cache"), **kwargs)
        dataset = paintings(4) if "painting" in path else tiny.pairs(4)
        return dataset.to_iterable_dataset() if streaming else dataset

    def downloaded(cls, name, **kwargs):
        folder = Path(name) if Path(name).is_dir() else tmp_path / "hub" / name
        if not folder.exists():
            (tiny.sdxl_pipeline() if "xl" in name else tiny.sd_pipeline()).save_pretrained(folder)
        return folder

    def from_pretrained(cls, name, **kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "variant")}
        return load_pipeline(downloaded(cls, name), **kwargs)

    def load_config(cls, name, **kwargs):
        return read_config(downloaded(cls, name))

    def shorten(config_class):
        post_init = config_class.__post_init__

        def shortened(config):
            post_init(config)  # with the page's own values, which it checks
            config.max_steps = 1 + len(list(Path(config.output_dir).glob("checkpoint-*")))
            config.per_device_train_batch_size, config.gradient_accumulation_steps = 2, 1
            config.report_to, config.disable_tqdm, config.resolution, config.num_inference_steps = [], True, None, 2

        monkeypatch.setattr(config_class, "__post_init__", shortened)

    def download(repository, file, **kwargs):
        """The only repository with files of its own is the expert's, which is trained when it is asked for."""
        assert repository == "user/painting-expert"
        if not (tmp_path / "expert").exists():
            args = AttributeSFTConfig(str(tmp_path / "expert"))
            expert = AttributeSFTTrainer(tiny.sdxl_pipeline(), args=args, train_dataset=paintings(4))
            expert.train()
            expert.save_model()
        return str(tmp_path / "expert" / file)

    def push_files(files, repo_id, **kwargs):
        uploads.append(repo_id.removeprefix("user/"))

    monkeypatch.setattr(datasets, "load_dataset", load_tiny_dataset)
    for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        monkeypatch.setattr(loader, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", classmethod(load_config))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", classmethod(downloaded))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipeline, *args: pipeline)
    monkeypatch.setattr("trl_diffusion.trainer.publishing.create_repository", lambda name, **kwargs: f"user/{name}")
    monkeypatch.setattr("trl_diffusion.trainer.publishing.push_files", push_files)
    monkeypatch.setattr("trl_diffusion.lora_files.hf_hub_download", download)
    monkeypatch.setattr("trl_diffusion.trainer.attributes.hf_hub_download", download)
    for config_class in CONFIGS:
        shorten(config_class)
    return uploads


def run(page: str) -> dict:
    """Runs the Python of a page from top to bottom, as a notebook; tracebacks show the page and its line."""
    scope = {}
    for block in re.finditer(r"^```python\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE):
        line = read(page)[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], DOCS / page, "exec"), scope)
    return scope


def test_python_of_the_readme(tiny_hub):
    """The README trains a LoRA, draws with it and pushes it, then both stages of CPO."""
    scope = run(README)
    assert Image.open("eagle.png").size == (32, 32) and tiny_hub == ["sd15-iapo"]
    assert Path("painting-expert", "attribute_expert.json").exists()
    assert type(scope["trainer"]) is ComplexPOTrainer and scope["trainer"].state.global_step == 1


def test_python_of_quickstart(tiny_hub):
    """The page trains the embedded pipeline, and the oracle judges what it draws."""
    scope = run("quickstart.md")
    assert len(scope["findings"]) == 8 and all(len(found) == 2 for found in scope["findings"])


def test_python_of_notebooks(tiny_hub):
    """Each helper shows a picture of the embedded data, with its verdicts, its size and its values."""
    scope = run("notebooks.md")
    assert scope["pair"].verdicts == [("blue square", "chosen"), ("green circle", "rejected")]
    assert scope["masks"].image.size == (2 * 264 + 8, 32 + 2 * (256 + 24 + 8))
    assert [image.size for image in scope["samples"].images["base"]] == [(32, 32)]
    assert scope["curves"].panels == {"loss": {("loss", "training"): {1: 0.69, 2: 0.52}}}


def test_python_of_dataset_formats(tiny_hub):
    """The page's pairs and paintings have its ids, conflicts and attributes, also loaded from a folder; its stream is one."""
    scope = run("dataset_formats.md")
    for name in ("dataset", "dataset_of_folder"):
        dataset = prepare_dataset(scope[name], name, COLUMNS, COLUMNS[1:])
        batch = InstancePairCollator(32)(list(dataset))
        assert batch["id"] == ["lake-001", "lake-002"]
        assert batch["judged"].tolist() == batch["conflicts"].tolist() == [[True], [False]]
    assert isinstance(scope["stream"], datasets.IterableDataset)

    masked = prepare_dataset(scope["masked_dataset"], "masked", COLUMNS, COLUMNS[1:])
    batch = InstancePairCollator(480)(list(masked))
    assert batch["chosen_masks"].shape == (2, 1, 480, 60) and "rejected_masks" not in batch
    mask = unpacked(batch["chosen_masks"], 480, 480)[0, 0].numpy()
    assert np.array_equal(mask, decode_rle(scope["encoded_eagle"])[:, 80:560])

    for name in ("paintings", "labelled_paintings"):
        dataset = prepare_dataset(scope[name], name, AttributeSFTTrainer.columns, AttributeSFTTrainer.image_columns)
        check_attribute_columns(dataset, name, painting(), allow_none=False)
        batch = AttributeCollator(32, criteria=painting())(list(dataset))
        assert batch["id"] == ["harbor-001", "harbor-002"]
        assert batch["positive_attributes"] == [["weight_balance", "base_stability"], ["weight_balance"]]
        assert batch["negative_attributes"] == [["core_shadow"], []]


def test_python_of_from_pairs_to_a_model(tiny_hub):
    """The page draws with the LoRA of its training, which changes the image."""
    save_lora(tiny.sdxl_pipeline(), Path("aligned"))
    scope = run("from_pairs_to_a_model.md")
    images = [np.asarray(scope["pipeline"]("a cat", generator=torch.manual_seed(0)).images[0], dtype=float)]
    scope["pipeline"].unload_lora_weights()
    images.append(np.asarray(scope["pipeline"]("a cat", generator=torch.manual_seed(0)).images[0], dtype=float))
    assert scope["image"].size == (32, 32) and np.abs(images[0] - images[1]).max() > 1


def test_python_of_instance_dpo_trainer(tiny_hub):
    """The page trains, resumes, saves, loads and draws; its masks have the weights that its comments say."""
    scope = run("instance_dpo_trainer.md")
    for name, inside, outside in (("mean_mask", 4 / 7, 8 / 7), ("covering_mask", 0, 4 / 3)):
        rows = [[inside] * 2 + [outside] * 2] * 2 + [[outside] * 4] * 2
        assert scope[name].flatten().tolist() == pytest.approx([weight for row in rows for weight in row])
    assert scope["image"].size == (32, 32) and len(scope["images"]) == 2
    assert Path("sd15-iapo-lora", "samples", "step-000001.png").exists()
    assert scope["trainer"].state.global_step == 2  # one, and one more after it was resumed
    trainer = scope["InstanceDPOTrainer"](tiny.sd_pipeline(), train_dataset=tiny.pairs(2), eval_dataset=tiny.pairs(2))
    check_metrics(trainer, "instance_dpo_trainer.md")


def test_python_of_annotation(tiny_hub, monkeypatch):
    """The page joins the annotations of a run with their source; what comes out has the trainers' columns."""
    pairs = preference_dataset(4, seed=0)
    source, columns = prepare_rows(pairs.remove_columns("instances"), pair_columns)
    roles = Planner(OracleVLM()), OracleDetector(), Judge(OracleVLM(), crop_size=64)
    annotate(source, instance_task(*roles, {"name": "world", "split": "train"}, columns), "annotations", run_locally)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: source.to_iterable_dataset())
    joined = list(run("annotation.md")["train_dataset"])
    assert [row["id"] for row in joined] == pairs["id"] and set(joined[0]) == set(pairs.features)


def folders_of_the_hub(*names: str) -> None:
    """Folders that are called like repositories of the Hub, so that a name finds them."""
    for name in names:
        Path(name).mkdir(parents=True)


def test_python_of_metrics(tiny_hub, monkeypatch):
    """The page scores by tiny weights: `evaluate` and the plain scorer agree, and the figures of its comments are right."""

    class Features:
        spec, weights = "means", {"means": "1"}

        def __init__(self, weights_path=None, device=None):
            pass

        def __call__(self, images, batch_size=32, disable_tqdm=True):
            files = images if isinstance(images, list) else sorted(Path(images).iterdir())
            return torch.stack(
                [torch.tensor(open_image(file).resize((1, 1)).getpixel((0, 0))).double() for file in files]
            )

    monkeypatch.setattr("trl_diffusion.metrics.inception.InceptionFeatures", Features)
    folders_of_the_hub("Qwen/Qwen2.5-VL-7B-Instruct", "IDEA-Research/grounding-dino-base", "references")
    clip_folder(Path("yuvalkirstain/PickScore_v1"))
    clip_folder(Path("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    for seed, name in enumerate(("eagle", "cats", "dog")):
        tiny.image(seed).save(f"{name}.png")
        for other in (10, 20):
            tiny.image(seed + other).save(f"references/{seed}-{other}.png")

    scope = run("metrics.md")
    scores = scope["scores"]
    (alone,) = scope["pickscore"].scorer.score(["eagle.png"], ["an eagle over a lake"]).values
    assert alone == pytest.approx(scores.values[0], abs=1e-4)
    assert set(scope["result"]) == {"win_rate", "lower", "upper", "num_pairs", "num_ties", "left_out"}
    assert f"# {scope['result']['win_rate']}, and a 95 % interval" in read("metrics.md")
    assert scope["results"][0]["num_references"] == 6
    assert [next(iter(result)).split("_")[0] for result in scope["results"]] == ["fid", "kid"]
    for name in ("num_negative", "caption_match"):
        assert scope[name].scorer_settings


def test_every_metric_is_on_its_page():
    """The page names each metric by its module's name, no other in its table, and which of them look at the prompt."""
    page = read("metrics.md")
    assert all(f"`{name}`" in page or f'metric_path("{name}")' in page for name in METRICS)
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (yes|no) \|", section("metrics.md", "Scores of single images"), re.MULTILINE
    )
    assert {name for name, _ in rows} == set(METRICS) - {"fid", "kid", "win_rate"}
    for name, needs in rows:
        module = importlib.import_module(f"trl_diffusion.metrics.{name}")
        (scorer,) = [
            c for c in vars(module).values() if getattr(c, "name", None) == name and c.__module__ == module.__name__
        ]
        assert scorer.needs_prompts == (needs == "yes")


def test_python_of_evaluation(tiny_hub, monkeypatch):
    """The page compares a tiny pipeline with a LoRA on it, pushes what it found, and its callback logs scores."""
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    tiny.sd_pipeline().save_pretrained(base)
    save_lora(tiny.sd_pipeline(), Path("sd15-iapo-lora"))
    clip_folder(Path("yuvalkirstain/PickScore_v1"))
    clip_folder(Path("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    rows = [{"id": None, "prompt": prompt, "group": None} for prompt in ("a red cat", "a dog", "a blue circle")]
    monkeypatch.setattr("trl_diffusion.evaluation.prompts.read_benchmark", lambda benchmark, revision: (rows, "1"))
    pushed = {}
    monkeypatch.setattr("trl_diffusion.evaluation.push.create_repository", lambda repo_id, *args: repo_id)
    monkeypatch.setattr("trl_diffusion.evaluation.push.HfApi.list_repo_files", lambda *args, **kwargs: [])
    monkeypatch.setattr(
        "trl_diffusion.evaluation.push.push_files", lambda files, *args, **kwargs: pushed.update(files)
    )
    scope = run("evaluation.md")
    assert {"README.md", "summary.json", "disputed.jpg", "data/train-00000-of-00001.parquet"} <= pushed.keys()
    assert list(scope["summary"]["scores"]) == ["base", "iapo"]
    folder = Path("evaluation")
    for name in re.findall(r"^- `([\w.]+)`", read("evaluation.md"), re.MULTILINE):
        assert (folder / name).exists(), name
    assert [path.name for path in sorted((folder / "images" / "iapo").glob("*.png"))] == [
        f"0000{i}_0.png" for i in range(3)
    ]
    logged = [entry for entry in scope["trainer"].state.log_history if "eval_pickscore" in entry]
    assert [entry["step"] for entry in logged] == [0, 1] and logged[0]["eval_pickscore_win_rate"] == 0.5


def test_the_protocols_are_on_their_page():
    """The table lists the protocols that are shipped, with their settings, all of which are unknown."""
    table = section("evaluation.md", "Protocols")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d.]+) \|", table, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(shipped_protocols())
    for name, steps, guidance in rows:
        protocol = load_protocol(name)
        assert (protocol.num_inference_steps, protocol.guidance_scale) == (int(steps), float(guidance))
        assert protocol.unknown


def test_python_of_speed(tiny_hub):
    """The page precomputes and trains."""
    scope = run("speed.md")
    assert scope["trainer"].state.global_step == 1
    assert {path.name.split("-")[0] for path in Path("precomputed").glob("*.arrow")} == {"images", "prompts"}


def check_metrics(trainer, page: str):
    """Every metric is in the page's table, and nothing else is."""
    documented = set()
    for names in re.findall(r"^\| (`[^|]+) \|", section(page, "Logged metrics"), re.MULTILINE):
        documented |= set(re.findall(r"`([\w/]+)`", names))
    trainer.args.logging_steps = 1
    trainer.train()
    keys = {name for entry in trainer.state.log_history[:-1] for name in entry}  # the last one sums the training up
    assert keys - {"grad_norm", "learning_rate", "epoch", "step"} == documented
    other = r"eval_(runtime|.*_per_second|model_preparation_time)|epoch"
    evaluated = {name for name in trainer.evaluate() if not re.fullmatch(other, name)}
    assert evaluated == {f"eval_{name}" for name in documented}


def test_python_of_criteria(tiny_hub):
    """The page's attributes and prompts are those that its comments show, and its own tree loads."""
    (tree,) = blocks("criteria.md", "yaml")
    Path("still_life.yaml").write_text(tree)
    scope = run("criteria.md")
    comments = re.findall(r"^print\(\w+\)  # (.*)$", "".join(blocks("criteria.md", "python")), re.MULTILINE)
    assert [scope["prompt"], scope["short_prompt"]] == comments and scope["left_out"] == 1
    attribute = scope["attribute"]
    assert f"print(attribute.path)  # {attribute.path}".replace("'", '"') in read("criteria.md")
    table = section("criteria.md", "The tree of paintings")
    levels = re.findall(r"^\| \d \| (\w+) \| `(\w+)`", table, re.MULTILINE)
    assert levels == list(zip(scope["criteria"].levels, (*attribute.path, attribute.id), strict=True))
    assert f"`core_shadow`: {attribute.positive}, or {attribute.negative} |" in table
    assert [leaf.id for leaf in scope["still_life"].attributes] == ["shadow_edges", "glass_light", "overlap"]


def test_python_of_diffusion_kto_trainer(tiny_hub):
    """The page makes labelled images of pairs, and trains on them; its metrics are those that are logged."""
    scope = run("diffusion_kto_trainer.md")
    assert scope["dataset"]["label"][:2] == [True, False]
    assert scope["trainer"].state.global_step == 1
    data = unpair_pairs(tiny.pairs(2))
    trainer = scope["DiffusionKTOTrainer"](tiny.sd_pipeline(), train_dataset=data, eval_dataset=data)
    check_metrics(trainer, "diffusion_kto_trainer.md")


def test_python_of_attribute_sft_trainer(tiny_hub, capsys):
    """The page trains and saves an expert, shows a prompt, and draws with it; the prompt that it explains is right."""
    scope = run("attribute_sft_trainer.md")
    page = read("attribute_sft_trainer.md")
    saved = {path.name for path in Path("painting-expert").iterdir()}
    for name in ("pytorch_lora_weights.safetensors", "attribute_expert.json"):
        assert name in saved and f"`{name}`" in page
    assert Path("positive.png").exists() and Path("negative.png").exists()
    assert "['a" in capsys.readouterr().out

    expert = scope["expert"]
    expert.backbone.fits = lambda prompt: True  # unlike the 12 tokens of the tiny encoders
    row = {"id": ["0"], "prompt": ["a harbor at dusk"], "negative_attributes": [["core_shadow"]]}
    prompts = expert.prompts({**row, "positive_attributes": [["base_stability", "weight_balance"]]})
    assert f"```\n{prompts[0]}\n```" in page
    trainer = AttributeSFTTrainer(tiny.sd_pipeline(), train_dataset=paintings(4), eval_dataset=paintings(4))
    check_metrics(trainer, "attribute_sft_trainer.md")


def test_python_of_complex_po_trainer(tiny_hub):
    """The page trains on an expert, saves, pushes, and draws with both adapters; its minimum and its margin are right."""
    args = ComplexPOConfig("sdxl-cpo-reversed", reverse_preference=True)  # as the page's command
    reversed_trainer = ComplexPOTrainer(tiny.sdxl_pipeline(), "user/painting-expert", args, train_dataset=paintings(4))
    reversed_trainer.train()
    reversed_trainer.save_model()
    scope = run("complex_po_trainer.md")
    assert tiny_hub == ["sdxl-cpo-paired"]
    assert Path("sdxl-cpo", "samples", "step-000001.png").exists()
    assert scope["image"].size == (32, 32) and len(scope["images"]) == 2

    # The minimum and the largest margin
    z_w, z_l, ref_pred = torch.randn(3, 1, 4, 64, 64)
    z_t = reflected_target(ref_pred, z_l, weight=1.0)
    minimum = (ref_pred + (z_w - z_l) / 2).requires_grad_()
    errors = [per_sample_errors(*of) for of in ((minimum, z_w), (minimum, z_t), (ref_pred, z_w), (ref_pred, z_t))]
    losses, chosen_rewards, rejected_rewards = complex_po_loss(*errors, 2.0, torch.ones(1), stabilized=True)
    losses.sum().backward()
    assert minimum.grad.abs().max() < 1e-6
    margin = chosen_rewards - rejected_rewards
    torch.testing.assert_close(margin, 2.0 * (z_w - z_l).pow(2).mean(dim=(1, 2, 3)) / 4)

    trainer = ComplexPOTrainer(
        tiny.sdxl_pipeline(), "user/painting-expert", train_dataset=paintings(4), eval_dataset=paintings(4)
    )
    check_metrics(trainer, "complex_po_trainer.md")

    # The minimum without an expert is half a step of guidance away from the degraded prompt, and what is said of the start is so
    degraded = scope["degraded"]
    assert degraded.expert is None and degraded.state.global_step == 1
    z_w = ref_pred
    minimum = (ref_pred + (ref_pred - z_l) / 2).requires_grad_()
    z_t = reflected_target(ref_pred, z_l, weight=1.0)
    errors = [per_sample_errors(*of) for of in ((minimum, z_w), (minimum, z_t), (ref_pred, z_w), (ref_pred, z_t))]
    complex_po_loss(*errors, 2.0, torch.ones(1), stabilized=True)[0].sum().backward()
    assert minimum.grad.abs().max() < 1e-6


def test_python_of_ddspo_trainer(tiny_hub):
    """The page trains a LoRA and saves it, and names what is logged."""
    scope = run("ddspo_trainer.md")
    assert scope["trainer"].state.global_step == 1
    assert Path("sd15-ddspo", "pytorch_lora_weights.safetensors").exists()
    trainer = DDSPOTrainer(tiny.sd_pipeline(), train_dataset=tiny.pairs(4), eval_dataset=tiny.pairs(4))
    check_metrics(trainer, "ddspo_trainer.md")


def test_python_of_models(tiny_hub, tmp_path):
    """The page's trainer trains Stable Diffusion 3, here a tiny one; its quantisation names what it says."""
    code, quantized = blocks("models.md", "python")
    tiny.sd3_pipeline().save_pretrained(tmp_path / "sd3")
    scope = {}
    exec(code.replace("stabilityai/stable-diffusion-3.5-medium", str(tmp_path / "sd3")), scope)
    trainer = scope["trainer"]
    assert type(trainer.backbone.pipeline).__name__ == "StableDiffusion3Pipeline"
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1
    exec(quantized.replace("bf16=True", "use_cpu=True"), scope)
    config = scope["args"].model_init_kwargs["quantization_config"]
    assert list(read_quantization(config, "transformer", ("text_encoder", "text_encoder_2"))) == [
        "transformer",
        "text_encoder_2",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_python_names_exist(page):
    """Every Python block compiles, also on a page that is not run, and imports only names that this package has."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_diffusion":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            for config in CONFIGS:
                if isinstance(node, ast.Call) and ast.unparse(node.func) == config.__name__:
                    assert {kw.arg for kw in node.keywords} <= {f.name for f in dataclasses.fields(config)}


def test_every_page_with_python_is_run():
    """A new page with Python needs a test above."""
    assert {page for page in PAGES if blocks(page, "python")} == {
        "annotation.md",
        "attribute_sft_trainer.md",
        "complex_po_trainer.md",
        "criteria.md",
        "dataset_formats.md",
        "ddspo_trainer.md",
        "diffusion_kto_trainer.md",
        "evaluation.md",
        "from_pairs_to_a_model.md",
        "instance_dpo_trainer.md",
        "metrics.md",
        "models.md",
        "notebooks.md",
        "quickstart.md",
        "speed.md",
    }


# ---- Commands ----


def command_lines() -> list[tuple[str, str]]:
    """The lines of the bash blocks, continued lines joined."""
    return [
        (page, line)
        for page in [README, *PAGES]
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines(page, line, tmp_path):
    """Every flag of a printed command is the command's or the launcher's, and every file that it names is there."""
    program, *words = shlex.split(line)
    for word in words:
        if word.startswith(("examples/", "trl_diffusion/scripts/")) or word == "constraints.txt":
            assert (ROOT / word).is_file()
    if Path(program).name == "trl-diffusion":
        command, *words = words
        own, *launcher = parsers(command)
        _, remaining = own.parse_known_args(words)
        for parser in launcher:
            _, script = parser.parse_known_args([*remaining, "script.py"])
            remaining = [] if script == [] else script
        assert remaining == []
    elif program == "python":
        script, *words = words
        files = [ROOT / script]
        if script == "-m":
            module = ROOT / words[0].replace(".", "/")
            if words[0] == "examples.study":
                _, remaining = (
                    importlib.import_module("examples.study.__main__").make_parser().parse_known_args(words[1:])
                )
                assert remaining == []
                return
            files = [module / "__main__.py", *module.parent.glob("common.py")]
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    elif program in ("uv", "hf") and "run" in words:
        (script,) = [word for word in words if word.endswith(".py")]
        (command,) = [command for command in COMMANDS if script_of(command).__file__ == str(ROOT / script)]
        _, remaining = parsers(command)[0].parse_known_args(words[words.index(script) + 1 :])
        assert remaining == []
    elif program == "accelerate":
        namespace = launch_command_parser().parse_args(words[1:])
        assert importlib.import_module("trl_diffusion.scripts.instance_dpo").make_parser()
        assert namespace.training_script_args[::2] == ["--config"]
    elif program == "docker":
        image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        assert words[0] in ("build", "run") and "trl-diffusion" in words
        assert all(f"ARG {word}" in image for word in words if word.endswith("="))
        assert all(word.endswith(":/results") for flag, word in zip(words, words[1:]) if flag == "-v")
        assert "VOLUME /results" in image
    else:
        assert program in ("python3", ".venv/bin/pip")


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text(page):
    """Every flag that a text or a table names belongs to a command, under whose heading it stands where it has one."""
    known = set().union(*(flags_of(command) for command in COMMANDS))
    assert set(re.findall(r"`(--[\w-]+)", prose(page))) <= known
    for command in COMMANDS:
        if page == "cli.md":
            assert set(re.findall(r"`(--[\w-]+)", section(page, command))) <= flags_of(command)
    if page == "quickstart.md":
        assert set(re.findall(r"`(--[\w-]+)", prose(page))) <= flags_of("quickstart")


@pytest.mark.parametrize(
    ("page", "heading", "command"),
    [
        ("quickstart.md", "Flags", "quickstart"),
        ("cli.md", "annotate-instances", "annotate-instances"),
        ("cli.md", "annotate-attributes", "annotate-attributes"),
        ("cli.md", "evaluate", "evaluate"),
        ("cli.md", "show-masks", "show-masks"),
        ("cli.md", "show-criteria", "show-criteria"),
    ],
)
def test_defaults_in_the_tables(page, heading, command):
    """The defaults beside the flags in a table are the command's."""
    defaults = {flag: action.default for action in parsers(command)[0]._actions for flag in action.option_strings}
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|\s][^|]*) \|", section(page, heading), re.MULTILINE)
    assert rows
    for flags, values in rows:
        expected = [str(defaults[flag]) for flag in re.findall(r"`(--\w+)`", flags)]
        assert values.replace("`", "").split(", ") == expected


def test_every_command_has_its_section():
    """The page of the command line describes the commands that exist."""
    assert set(re.findall(r"^## ([a-z-]+)$", prose("cli.md"), re.MULTILINE)) == set(COMMANDS)


def test_yaml_examples():
    """A YAML example is a tree of criteria, or every key of it is a flag of `instance-dpo` or of the launcher, or `env`."""
    for page in PAGES:
        for block in blocks(page, "yaml"):
            keys = set(yaml.safe_load(block))
            if "tree" in keys:
                assert parse_criteria(block, page).attributes
            else:
                assert {f"--{key}" for key in keys} - {"--env"} <= flags_of("instance-dpo")


# ---- Structure ----


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, "../../CONTRIBUTING.md", "log.md", *PAGES])
def test_links(page):
    """Every relative link leads to a file of the repository, and its anchor to a heading there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = ((DOCS / page).parent / name).resolve() if name else DOCS / page
            assert path.exists() and path.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(path), target


def test_table_of_contents():
    """The table of contents lists every page once, and no other."""
    sections = yaml.safe_load((DOCS / "_toctree.yml").read_text(encoding="utf-8"))
    listed = [entry["local"] for part in sections for entry in part["sections"]]
    assert sorted(listed) == sorted(path.stem for path in DOCS.glob("*.md"))
    assert all(entry["title"] for part in sections for entry in (part, *part["sections"]))


@pytest.mark.parametrize("page", PAGES)
def test_autodoc(page):
    """Every documented object, and every method listed below one, exists and has a docstring of its own or inherited."""
    for name, methods in re.findall(r"^\[\[autodoc\]\] (\S+)\n((?: +- \w+\n)*)", read(page), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        documented = getattr(importlib.import_module(f"trl_diffusion.{module}".rstrip(".")), attribute)
        assert documented.__doc__
        assert all(callable(getattr(documented, method)) for method in re.findall(r"- (\w+)", methods))


def documented_names(page: str) -> set[str]:
    """The public names that a page documents."""
    return set(re.findall(r"^\[\[autodoc\]\] (\w+)$", read(page), re.MULTILINE))


def test_every_public_name_is_documented():
    """Each trainer and its configuration on a page of theirs, and every other name on one page, once."""
    for page, name in (
        ("instance_dpo_trainer.md", "InstanceDPO"),
        ("attribute_sft_trainer.md", "AttributeSFT"),
        ("complex_po_trainer.md", "ComplexPO"),
        ("ddspo_trainer.md", "DDSPO"),
        ("diffusion_kto_trainer.md", "DiffusionKTO"),
    ):
        assert {f"{name}Trainer", f"{name}Config"} <= documented_names(page)
    names = [name for page in PAGES for name in documented_names(page)]
    assert sorted(names) == sorted(trl_diffusion.__all__)


def test_paper_index():
    """Each paper that the package cites by its number is on the page, with a link; the settings that it names exist."""
    sources = [path for kind in ("py", "yaml") for path in (ROOT / "trl_diffusion").rglob(f"*.{kind}")]
    cited = {
        number for path in sources for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text(encoding="utf-8"))
    }
    page = read("paper_index.md")
    linked = re.findall(r"\[([\d.]+)\]\(https://huggingface\.co/papers/([\d.]+)\)", page)
    assert all(shown == number for shown, number in linked) and len(linked) == len(set(linked))
    idea = "2311.12092"  # concept sliders, which no code follows
    assert {number for _, number in linked} == cited | {idea}
    settings = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    assert set(re.findall(r"`(\w+)=", page)) <= settings
    assert all(f"`{protocol}`" in page for protocol in shipped_protocols())


def test_every_recipe_is_on_a_page_with_its_settings():
    """Each is linked where a user chooses one; the table of the other objectives has the numbers of their files."""
    linked = "".join(read(page) for page in ("which_model.md", "hyperparameters.md"))
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "examples" / "configs").glob("*.yaml")}
    assert {name for name in recipes if f"examples/configs/{name}.yaml)" not in linked} == set()
    rows = re.findall(r"^\| \[`(\w+)`\]\(\S+\) \| (.+) \|$", read("hyperparameters.md"), re.MULTILINE)
    assert len(rows) == 7
    for name, row in rows:
        _, model, trained, data, beta, rate, num_rows, steps, _ = row.split(" | ")
        recipe = recipes[name]
        assert {"SDXL": "stable-diffusion-xl", "Stable Diffusion 1.5": "v1-5"}[model] in recipe["model_name_or_path"]
        assert (trained == "LoRA") == ("lora_r" in recipe)
        assert data in ("pairs", "images", "images with a label", "images with attributes")
        assert (float(beta), float(rate)) == (recipe["beta"], recipe["learning_rate"])
        at_once = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
        assert int(num_rows) == at_once * (4 if name == "kto_sd15" else 1)  # GPUs
        assert steps == ("1 epoch" if "num_train_epochs" in recipe else str(recipe["max_steps"]))


def test_the_first_losses():
    """Those on the page are the losses of a policy that is its reference."""
    error = torch.full((1,), 0.3)
    errors = PairErrors(error, error, error, error, torch.zeros(1))
    first = {
        name: PAIR_LOSSES[name](errors, PairSettings(0.001, smoothing))[0].item()
        for name, smoothing in {"ipo": 0.0, "hinge": 0.0, "dspo": 0.0, "dmpo": 0.01}.items()
    }
    assert InstanceDPOConfig("out", loss_type="dmpo").label_smoothing == 0.01
    assert first["dspo"] == pytest.approx(0.3)
    reward, kl = torch.zeros(1), torch.zeros(())
    kto = {
        name: diffusion_kto_loss(reward, torch.tensor([True]), kl, name, 1.0, 1.0).item()
        for name in ("kto", "log_sigmoid", "risk_seeking")
    }
    page = read("loss_health.md")
    assert (
        f'{kto["kto"]:.3g}; {kto["log_sigmoid"]:.3f} with `"log_sigmoid"`, {kto["risk_seeking"]:.3f} with `"risk_seeking"`'
        in page
    )
    assert f"{first['ipo']:.2f}, {first['hinge']:.0f}, and {first['dmpo']:.2f} with the default" in page


def test_what_to_cite_is_in_the_paper_index():
    """Each paper of CITATION.cff, by its number, or by its title or name where it has none."""
    page = re.sub(r"\s+", " ", read("paper_index.md"))
    for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]:
        numbers = [each["value"].removeprefix("arXiv:") for each in paper.get("identifiers", [])]
        for number in numbers:
            assert f"[{number}](https://huggingface.co/papers/{number})" in page
        assert numbers or paper["title"] in page or f"{paper['abbreviation']}, " in page, paper["title"]


# ---- Messages ----


def test_error_tables(tmp_path):
    """Each message in the table of errors is how the message for one of these mistakes starts."""
    instance = {"label": "x", "chosen_box": [0, 0, 9, 9], "rejected_box": [0, 0, 9, 9], "preference": "chosen"}
    row = {
        "id": "001",
        "prompt": "a cat",
        "chosen": Image.new("RGB", (16, 16)),
        "rejected": Image.new("RGB", (16, 16)),
    }
    pairs = tiny.pairs(1)
    named = trl_diffusion.instance_pair_features()
    named["instances"].feature["preference"] = datasets.ClassLabel(names=["tie", "chosen", "rejected"])
    of_datasets = [
        pairs.remove_columns("chosen"),
        datasets.DatasetDict({"train": pairs}),
        pairs.select([]),
        datasets.Dataset.from_list([{**row, "instances": "none"}]),
        datasets.Dataset.from_list([{**row, "instances": []}], features=named),
        datasets.Dataset.from_list([{**row, "prompt": 3}]),
        datasets.Dataset.from_list([{**row, "instances": [instance | {"preference": 1}]}]),
    ]
    of_rows = [
        row | {"chosen": str(tmp_path / "missing.png")},
        row | {"instances": [instance | {"chosen_box": [0, 0, 99, 9]}]},
        row | {"instances": [instance | {"preference": "better"}]},
        row | {"instances": [instance | {"chosen_mask": Image.new("1", (8, 8), 1)}]},
        row | {"id": None},
        row | {"prompt": None},
    ]
    messages = []
    for dataset in of_datasets:
        with pytest.raises(ValueError) as error:
            prepare_dataset(dataset, "train_dataset", COLUMNS, COLUMNS[1:])
        messages.append(str(error.value))
    for broken in of_rows:
        with pytest.raises(ValueError) as error:
            InstancePairCollator(16)([broken])
        messages.append(str(error.value))
    messages += attribute_errors()
    starts = message_starts("dataset_formats.md")
    assert starts and all(sum(message.startswith(start) for message in messages) == 1 for start in starts)


def message_starts(page: str) -> list[str]:
    """How messages start, as the tables of errors of the page say."""
    lines = re.findall(r"^\| .+? \| (.+) \|$", section(page, "Errors"), re.MULTILINE)
    return [line.removesuffix("...").strip() for line in lines if not line.startswith("the message")]


def check_messages(page: str, messages: list[str]):
    """The messages start as the tables of the page say, in their order."""
    starts = message_starts(page)
    assert len(starts) == len(messages)
    for start, message in zip(starts, messages):
        assert message.startswith(start)


def attribute_errors() -> list[str]:
    """The messages for each mistake in attributes."""
    criteria = painting()
    row = {**paintings(1)[0], "id": "001", "positive_attributes": ["core_shadow"], "negative_attributes": []}
    reversed_tree = Criteria(criteria.name, criteria.levels, criteria.attributes[::-1])
    bare = [{**row, "positive_attributes": []}, {**row, "id": "002"}]
    of_datasets = [
        ([row], attribute_features(reversed_tree)),
        ([{**row, "negative_attributes": ["vague shadow boundaries"]}], None),
        ([{**row, "negative_attributes": ["core_shadow"]}], None),
        ([{**row, "positive_attributes": ["core_shadow", "core_shadow"]}], None),
        ([{**row, "positive_attributes": "core_shadow"}], None),
        (bare, attribute_features()),
    ]
    messages = []
    for rows, features in of_datasets:
        dataset = datasets.Dataset.from_list(rows, features=features)
        with pytest.raises(ValueError) as error:
            check_attribute_columns(dataset, "train_dataset", criteria, allow_none=False)
        messages.append(str(error.value))
    inputs = {"id": ["001"], "prompt": ["a"], "positive_attributes": [[]], "negative_attributes": [[]]}
    with pytest.raises(ValueError) as error:
        randomness = SimpleNamespace(drop_prompts=lambda prompts, ids: prompts)
        ComplexPOTrainer.expert_prompts(SimpleNamespace(args=None, randomness=randomness), inputs)
    return [*messages, str(error.value)]


def test_errors_of_trees():
    """Each message in the table of the page on criteria is how the message for that mistake in its example starts."""
    (tree,) = blocks("criteria.md", "yaml")
    shadow_edges = re.search(r"    shadow_edges:\n(.*?\n)    glass_light:", tree, re.DOTALL)[1]
    definition = shadow_edges.splitlines(keepends=True)[-1]
    changes = [
        ("    shadow_edges:", "    shadow_edges: {"),
        ("levels: [dimension, attribute]\n", ""),
        (definition, ""),
        (f"    shadow_edges:\n{shadow_edges}", shadow_edges.replace("      ", "    ")),
        ("    overlap:", "    shadow_edges:"),
    ]
    messages = []
    for before, after in changes:
        assert tree.count(before) == 1
        with pytest.raises(ValueError) as error:
            parse_criteria(tree.replace(before, after), "still_life.yaml")
        messages.append(str(error.value))
    check_messages("criteria.md", messages)
