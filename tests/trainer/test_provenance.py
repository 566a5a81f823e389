# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a card says of where a training comes from: true, enough to repeat it, and nothing of the machine."""

import dataclasses
import json
import random
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, DatasetInfo, concatenate_datasets
from huggingface_hub import constants
from peft import LoraConfig
from transformers import TrainerState

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    ComplexPOConfig,
    DDSPOConfig,
    DiffusionKTOConfig,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    ModelConfig,
)
from trl_diffusion.cards.facts import DataFacts
from trl_diffusion.cli.main import script_of
from trl_diffusion.scripts.utils import dataset_flags, get_model, get_peft_config
from trl_diffusion.trainer import provenance
from trl_diffusion.trainer.provenance import (
    NOT_IN_RECIPE,
    command_line,
    data_facts,
    forget_trackers,
    hardware,
    public_name,
    recipe_of,
    tracker_urls,
    training_seconds,
)


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
CONFIGS = {
    "instance-dpo": InstanceDPOConfig,
    "attribute-sft": AttributeSFTConfig,
    "complex-po": ComplexPOConfig,
    "ddspo": DDSPOConfig,
    "diffusion-kto": DiffusionKTOConfig,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOME = "/home/somebody"


def parse(command: str, recipe: Path | dict, tmp_path: Path):
    """The dataclasses of a command and a YAML file; an `output_dir` is only a name."""
    if isinstance(recipe, dict):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        recipe = path
    return (
        script_of(command)
        .make_parser()
        .parse_args_and_config(["--config", str(recipe), "--report_to", "none", "--use_cpu"])
    )


def recipe_from(script_args, training_args, model_args, data: DataFacts | None = None, **given):
    """The recipe that a training of a command would write."""
    base = get_model(model_args, training_args)
    lora = get_peft_config(model_args, training_args.initial_lora)
    data = data or DataFacts(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    settings = {"expert": script_args.expert if isinstance(training_args, ComplexPOConfig) else None} | given
    return recipe_of(training_args, base, None, lora is not None, lora, data, **settings)


def settings_of(args) -> dict:
    """All that matters of a configuration."""
    known = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return {name: value for name, value in known.items() if name not in NOT_IN_RECIPE and name != "output_dir"}


# ----- the recipe -----


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_comes_back(path, tmp_path):
    """Every recipe of the examples, parsed, described, written and parsed again, is the same training."""
    kind = path.stem.split("_")[0]
    command = {"attribute": "attribute-sft", "cpo": "complex-po", "ddspo": "ddspo", "kto": "diffusion-kto"}.get(
        kind, "instance-dpo"
    )
    if command == "instance-dpo" and "criteria" in yaml.safe_load(path.read_text()):
        command = "complex-po"  # NPO
    before = parse(command, path, tmp_path)
    recipe = recipe_from(*parse(command, path, tmp_path))
    after = parse(command, recipe, tmp_path)
    assert dataclasses.asdict(after[2]) == dataclasses.asdict(before[2])
    assert dataclasses.asdict(after[0]) == dataclasses.asdict(before[0])
    assert settings_of(after[1]) == settings_of(before[1])
    assert after[1].output_dir == before[1].output_dir
    assert json.loads(json.dumps(recipe)) == recipe


OTHERS = {
    # What cannot be any value
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "logging_strategy": "epoch",
    "mode_scale": 0.5,
    "eval_strategy": "steps",
    "save_strategy": "best",
    "train_sampling_strategy": "sequential",
    "activation_checkpointing": False,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "size_conditions": "original",
    "precompute_dtype": "float16",
    "timestep_density": "logit_normal",
    "noise_source": "inversion",
    "inversion_model": "policy",
    "timestep_range": [1, 10],
    "mask_overlap": "covering",
    "attribute_order": "given",
    "attribute_separator": "/",
    "attribute_dropout": 0.25,
    "prompt_dropout": 0.125,
    "w_neg": -0.5,
    "label_smoothing": 0.25,
    "safeguard_mu": 0.5,
    "attribute_targets": "paired",
    "timestep_weighting": "min_snr",
    "policy_condition": "positive",
    "criteria": "user/criteria",
    "sample_prompts": ["a cat: on a mat", "/imagine a/b/c", "~ 1e-4", "", "# no comment"],
    "optim_target_modules": ["to_q", "to_k"],
    "lr_scheduler_kwargs": {"num_cycles": 0.5},
    "accelerator_config": {"split_batches": True},
    "metric_for_best_model": "eval_rewards/margins",
    "torch_compile_backend": "eager",
    "include_for_metrics": ["loss"],
    "label_names": ["a"],
    "bf16": True,
    "target_prompts": "attributes",
    "dropped_words": [0.25, 0.5],
    "model_init_kwargs": {"safety_checker": None, "dtype": {"default": "bfloat16"}},
}
# What only goes with others, or cannot be changed
WITH = {
    "precompute_ref_preds": {"precompute": True},
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 500},
    "eval_steps": {"eval_strategy": "steps"},
    "fp16": {"bf16": False},
    "logging_strategy": {"save_strategy": "no"},
    "greater_is_better": {"metric_for_best_model": "loss"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "save_strategy": {"metric_for_best_model": "loss"},
}
OTHER_LOSSES = {InstanceDPOConfig: "hinge", ComplexPOConfig: "unstabilized", DiffusionKTOConfig: "log_sigmoid"}
# The same of one configuration alone
WITH_OF = {ComplexPOConfig: {"dropped_words": {"target_prompts": "degraded"}}}
REFUSED_BY = {AttributeSFTConfig: {"precompute_ref_preds"}, DDSPOConfig: {"prompt_dropout"}}
REFUSED = {"remove_unused_columns", "tf32", "use_liger_kernel", "liger_kernel_config", "neftune_noise_alpha"}


def another(field: dataclasses.Field, value):
    """Another value of a setting."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    if isinstance(value, bool):
        return not value
    text = str(field.type)
    if isinstance(value, int | float):
        return value + 1
    if value is None and ("int" in text or "float" in text):
        return 2
    return True if "bool" in text else "another"


@pytest.mark.parametrize("command", CONFIGS)
def test_every_setting_comes_back(command, tmp_path):
    """Each field of a configuration, set to another value, is in the recipe and parsed from it again, or is of the machine."""
    kind = CONFIGS[command]
    default = kind(output_dir="out", report_to="none")
    missing = set()
    for field in dataclasses.fields(kind):
        if field.name in NOT_IN_RECIPE | REFUSED | REFUSED_BY.get(kind, set()):
            continue
        is_loss = field.name == "loss_type"
        value = OTHER_LOSSES[kind] if is_loss else another(field, getattr(default, field.name))
        with patch("transformers.training_args.TrainingArguments._validate_args", lambda self: None):
            settings = {"output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False}
            settings |= (WITH | WITH_OF.get(kind, {})).get(field.name, {})
            args = kind(**settings | {field.name: value})
            recipe = recipe_of(args, "user/base", None, False, None, DataFacts(), None)
            if field.name not in recipe:
                missing.add(field.name)
                continue
            after = parse(command, recipe, tmp_path)[1]
        assert settings_of(after) == settings_of(args), field.name
    assert missing == set()


@pytest.mark.parametrize("kind", CONFIGS.values())
def test_what_is_usual_is_not_said(kind):
    """A training with all defaults has the settings of its own method, which make the recipe, and of all others the precision alone."""
    args = kind(output_dir="out", report_to="none")
    recipe = recipe_of(args, "u/m", None, False, None, DataFacts(), None)
    own = {name: getattr(args, name) for name in vars(kind)["__annotations__"] if name != "mask_examples"}
    own = {name: value for name, value in own.items() if value is not None}
    assert len(own) >= 2
    assert recipe == own | {"model_name_or_path": "u/m", "use_peft": False, "output_dir": "out", "bf16": False}


def test_a_recipe_leaves_the_processes_alone():
    """It is written in the middle of a training, whose state a second configuration would reset."""
    args = InstanceDPOConfig("out", report_to="none", use_cpu=True)
    accelerator = Accelerator(cpu=True)
    recipe_of(args, "u/m", None, False, None, DataFacts(), None)
    assert accelerator.num_processes == 1


@pytest.mark.parametrize("seed", range(5))
def test_settings_together_come_back(seed, tmp_path):
    """Several settings at once, at random."""
    draw = random.Random(seed)
    names = (
        "resolution",
        "beta",
        "w_neg",
        "mask_overlap",
        "prompt_dropout",
        "learning_rate",
        "seed",
        "sample_prompts",
    )
    fields = {field.name: field for field in dataclasses.fields(InstanceDPOConfig)}
    default = InstanceDPOConfig("out", report_to="none")
    chosen = {name: another(fields[name], getattr(default, name)) for name in draw.sample(names, 5)}
    args = InstanceDPOConfig("out", report_to="none", use_cpu=True, bf16=bool(seed % 2), **chosen)
    after = parse("instance-dpo", recipe_of(args, "u/m", None, False, None, DataFacts(), None), tmp_path)[1]
    assert settings_of(after) == settings_of(args)


def test_the_precision_is_always_said():
    """A machine decides it where the user does not, so that a recipe without it would train otherwise elsewhere."""
    args = InstanceDPOConfig("out", report_to="none")
    assert recipe_of(args, "u/m", None, False, None, DataFacts(), None)["bf16"] is False
    with patch.object(type(args), "half_dtype", property(lambda self: torch.float16)):  # by `accelerate launch`
        recipe = recipe_of(args, "u/m", None, False, None, DataFacts(), None)
    assert (recipe["bf16"], recipe["fp16"]) == (False, True)


@pytest.mark.parametrize(
    "flags",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
        {"vae": "user/vae", "variant": "fp16", "model_revision": "v1"},
        {"single_file_config": "user/pipeline"},
        {
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.5,
            "lora_target_modules": ["to_k", "to_q"],
            "use_rslora": True,
        },
        {"use_peft": False},
    ],
    ids=str,
)
def test_the_model_comes_back(flags, tmp_path):
    """Each flag of the model is parsed from the recipe as it was given."""
    given = {"model_name_or_path": "user/base", "output_dir": "out", "use_peft": True} | flags
    before = parse("instance-dpo", given, tmp_path)[2]
    after = parse("instance-dpo", recipe_from(*parse("instance-dpo", given, tmp_path)), tmp_path)
    assert after[2] == before and after[1].model_init_kwargs is None


def test_other_quantization_comes_back(tmp_path):
    """What has no flag stays in `model_init_kwargs`."""
    settings = {"quantization_config": {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}}}
    args = InstanceDPOConfig("out", report_to="none", model_init_kwargs=settings)
    recipe = recipe_of(args, "u/m", None, True, LoraConfig(), DataFacts(), None)
    assert parse("instance-dpo", recipe, tmp_path)[1].model_init_kwargs == settings


def test_initial_lora_keeps_its_own_settings(tmp_path):
    """A LoRA that the training starts at is not described again, unless something was added to it."""
    args = InstanceDPOConfig("out", report_to="none", initial_lora="user/lora")
    recipe = recipe_of(args, "u/m", None, True, LoraConfig(r=16), DataFacts(), None)
    assert recipe["initial_lora"] == "user/lora" and not {"use_peft", "lora_r"} & set(recipe)
    with_dropout = recipe_of(
        args, "u/m", None, True, LoraConfig(r=16, lora_alpha=4, lora_dropout=0.5), DataFacts(), None
    )
    _, after, model = parse("instance-dpo", with_dropout, tmp_path)
    peft_config = get_peft_config(model, after.initial_lora)
    assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (16, 4, 0.5)


def test_data_and_base_are_pinned():
    """Commit, configuration and split are the command's flags; a part of a split is none."""
    args = InstanceDPOConfig("out", report_to="none")
    data = DataFacts("user/pairs", "hard", "validation", COMMIT, "mit", 10)
    recipe = recipe_of(args, "user/base", COMMIT[::-1], False, None, data, "user/expert")
    assert {name: recipe[name] for name in recipe if name.startswith("dataset")} == {
        "dataset_name": "user/pairs",
        "dataset_config": "hard",
        "dataset_revision": COMMIT,
        "dataset_train_split": "validation",
    }
    assert (recipe["model_revision"], recipe["expert"]) == (COMMIT[::-1], "user/expert")
    part = recipe_of(args, "user/base", None, False, None, DataFacts("u/d", split="train[:10%]"), None)
    assert "dataset_train_split" not in part and "model_revision" not in part


def test_the_flags_of_the_data_come_back(tmp_path):
    """What only the command knows of the data is in its recipe too, of a folder the last part."""
    flags = {"columns": {"prompt": "json.caption"}, "dataset_test_split": "held_out", "dataset_streaming": True}
    given = {"model_name_or_path": "u/m", "output_dir": "out", "dataset_name": "user/pairs", **flags}
    script_args, *_ = parse("instance-dpo", given, tmp_path)
    assert dataset_flags(script_args) == {"dataset_name": "user/pairs", **flags}
    script_args.dataset_name = f"{HOME}/data/pairs"
    assert dataset_flags(script_args)["dataset_name"] == "pairs"
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST)
    trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora())
    trainer._recipe_parameters = dataset_flags(script_args)
    trainer.create_model_card()
    recipe = yaml.safe_load((tmp_path / "out" / "training.yaml").read_text())
    assert recipe.items() >= {"dataset_name": "pairs", **flags}.items()
    assert parse("instance-dpo", {**given, **recipe}, tmp_path)[0].mapping == flags["columns"]


def test_nothing_of_the_machine_is_in_a_recipe(tmp_path, monkeypatch):
    """Paths are cut to their last part, and tokens, caches and accounts are left out, wherever they stand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "base").mkdir(parents=True)
    token = "hf_" + "a" * 30
    args = InstanceDPOConfig(
        f"{HOME}/runs/sd15-iapo/",
        report_to="none",
        initial_lora=f"{HOME}/loras/style.safetensors",
        sample_model="~/models/turbo",
        push_to_hub=True,
        hub_token=token,
        hub_model_id="somebody/sd15-iapo",
        precompute_dir=f"{HOME}/cache",
        run_name="secret",
        model_init_kwargs={
            "vae": f"{HOME}/vaes/vae.safetensors",
            "token": token,
            "cache_dir": f"{HOME}/.cache",
            "local_files_only": True,
            "dtype": torch.bfloat16,
            "scheduler": object(),
            "custom": {"folder": Path(HOME) / "deep" / "er", "token": token, "names": [f"{HOME}/a/b"]},
        },
    )
    recipe = recipe_of(args, "mine/base", None, True, LoraConfig(), DataFacts(), "../experts/painting")
    text = yaml.safe_dump(recipe)
    assert not any(word in text for word in ("somebody", "hf_", "secret", ".cache", "mine", "..", str(tmp_path)))
    assert recipe["output_dir"] == "sd15-iapo" and recipe["model_name_or_path"] == "base"
    assert recipe["initial_lora"] == "style.safetensors" and recipe["sample_model"] == "turbo"
    assert (recipe["vae"], recipe["expert"]) == ("vae.safetensors", "painting")
    assert recipe["model_init_kwargs"] == {"dtype": "bfloat16", "custom": {"folder": "er", "names": ["b"]}}


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("user/model", "user/model"),
        ("gpt2", "gpt2"),
        ("/data/models/base", "base"),
        ("/data/models/base/", "base"),
        ("~/base", "base"),
        ("./base", "base"),
        ("../../base", "base"),
        ("a/b/base", "base"),
        (r"C:\Users\somebody\base", "base"),
        (r"\\server\share\base", "base"),
        ("file:///home/somebody/base", "base"),
        (
            "https://somebody:pw@huggingface.co/u/m/blob/main/x.safetensors?token=1",
            "https://huggingface.co/u/m/blob/main/x.safetensors",
        ),
        ("hf_" + "x" * 34, "***"),
    ],
)
def test_public_names(name, public):
    assert public_name(name) == public


# ----- the command -----


def running(monkeypatch, *argv: str, processes: int = 1) -> None:
    monkeypatch.setattr(sys, "argv", list(argv))
    monkeypatch.setenv("WORLD_SIZE", str(processes))


SCRIPT = str(ROOT / "trl_diffusion" / "scripts" / "instance_dpo.py")
HEADS = [
    (SCRIPT,),
    ("/usr/bin/trl-diffusion", "instance-dpo"),
    (str(ROOT / "trl_diffusion" / "__main__.py"), "instance-dpo"),
]


@pytest.mark.parametrize("head", HEADS, ids=["launched", "command", "module"])
def test_the_command(monkeypatch, head):
    """However the command was started, it is said in one way."""
    running(monkeypatch, *head, "--dataset_name", "user/pairs", "--sample_prompts", "a cat", "it's /big")
    assert (
        command_line("instance-dpo")
        == """trl-diffusion instance-dpo --dataset_name user/pairs --sample_prompts 'a cat' 'it'"'"'s /big'"""
    )
    assert command_line("complex-po") is None


def test_a_copy_of_the_script_is_the_command(monkeypatch, tmp_path):
    """`uv run` with a link runs a copy under another name; a changed script is the user's own."""
    copy = tmp_path / "script7f.py"
    copy.write_bytes(Path(SCRIPT).read_bytes())
    running(monkeypatch, str(copy), "--output_dir", "out")
    assert command_line("instance-dpo") == "trl-diffusion instance-dpo --output_dir out"
    assert command_line("complex-po") is None
    copy.write_bytes(Path(SCRIPT).read_bytes() + b"#")
    assert command_line("instance-dpo") is None


def test_the_command_says_the_processes(monkeypatch):
    """The launcher's flags are not those of its processes, but their number is known."""
    running(monkeypatch, SCRIPT, "--output_dir", "out", processes=4)
    assert command_line("instance-dpo") == "trl-diffusion instance-dpo --num_processes 4 --output_dir out"


def test_the_command_has_nothing_of_the_machine(monkeypatch):
    """Folders and tokens are cut in every form a flag can have; a text is left as it is."""
    token = "hf_" + "a" * 30
    running(
        monkeypatch,
        *(SCRIPT, "--config", f"{HOME}/my/iapo.yaml", f"--output_dir={HOME}/runs/out", "--hub_token", token),
        *(f"--hub-token={token}", "--model_init_kwargs", json.dumps({"vae": f"{HOME}/vae", "token": token})),
        *("--vae", "~/vae.safetensors", "--dataset_name", f"file://{HOME}/data", "--sample_prompts", f"{token} /a/b"),
        *("--push_to_hub", "--attribute_separator", "/"),
    )
    command = command_line("instance-dpo")
    assert command == (
        """trl-diffusion instance-dpo --config iapo.yaml --output_dir=out --model_init_kwargs '{"vae": "vae"}' --vae """
        "vae.safetensors --dataset_name data --sample_prompts '*** /a/b' --push_to_hub --attribute_separator /"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["/usr/bin/pytest", "tests"],
        ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"],
        ["/home/somebody/instance_dpo.py", "--a", "b"],
        ["/home/somebody/scripts/instance_dpo.py"],
        [""],
        ["-c"],
        [],
        ["/usr/bin/trl-diffusion", "evaluate"],
    ],
    ids=str,
)
def test_other_programs_are_no_command(monkeypatch, argv):
    running(monkeypatch, *argv)
    assert command_line("instance-dpo") is None


# ----- the data -----


def prepared(tmp_path: Path, repo_id: str = "user/MyPairs", commit: str = COMMIT, rows: Dataset | None = None, **card):
    """Rows of the Hub as `datasets` keeps them once they are loaded, with what the Hub's own cache holds of them."""
    user, name = repo_id.split("/")
    snake = {"MyPairs": "my_pairs"}.get(name, name)
    folder = tmp_path / "datasets" / f"{user}___{snake}" / "hard-0ff" / "0.0.0" / commit
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or Dataset.from_dict({"a": list(range(8)), "b": ["x"] * 8})
    rows._data.table  # noqa: B018 - in memory
    import pyarrow as pa

    with pa.OSFile(str(folder / f"{snake}-validation.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, rows.data.table.schema) as writer:
            writer.write_table(rows.data.table)
    info = DatasetInfo(dataset_name=snake, config_name="hard", features=rows.features)
    info.write_to_directory(str(folder))
    snapshot = tmp_path / "hub" / f"datasets--{user}--{name}" / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit'} | card)}---\n")
    return Dataset.from_file(str(folder / f"{snake}-validation.arrow"), info=info, split="validation")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.chdir(tmp_path)


FOUND = DataFacts("user/MyPairs", "hard", "validation", COMMIT, "mit", 8)
CHANGES = {
    "as it is": lambda rows: rows,
    "map": lambda rows: rows.map(lambda row: {"a": row["a"] + 1}),
    "select": lambda rows: rows.select(range(7, -1, -1)),
    "filter": lambda rows: rows.filter(lambda row: True),
    "rename": lambda rows: rows.rename_column("a", "c"),
    "columns": lambda rows: rows.select_columns(["a"]).add_column("new", [0] * 8),
    "shuffle": lambda rows: rows.shuffle(seed=0).flatten_indices(),
    "cast": lambda rows: rows.cast_column("b", rows.features["b"]),
    "member": lambda rows: DatasetDict({"validation": rows})["validation"],
    "joined halves": lambda rows: concatenate_datasets(
        [rows.select(range(4)), rows.rename_column("b", "x").rename_column("x", "b").select(range(4, 8))]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_know_the_hub(tmp_path, hub_cache, change):
    """However rows of the Hub are changed, they are of the same dataset and commit, spelled as on the Hub."""
    assert data_facts(CHANGES[change](prepared(tmp_path)), None) == FOUND


@pytest.mark.parametrize("change", ["as it is", "map", "select"])
def test_streams_of_rows_know_the_hub(tmp_path, hub_cache, change):
    rows = CHANGES[change](prepared(tmp_path)).to_iterable_dataset().map(lambda row: row).shuffle()
    assert data_facts(rows, None) == dataclasses.replace(FOUND, num_rows=None)


def test_rows_of_several_sources_have_no_name(tmp_path, hub_cache):
    """Two datasets, two commits, or the Hub's rows and some of this machine: none of them is the source of all rows."""
    rows = prepared(tmp_path)
    others = (
        prepared(tmp_path, "user/more"),
        prepared(tmp_path, commit=COMMIT[::-1]),
        Dataset.from_dict({"a": [1], "b": ["y"]}),
    )
    for other in others:
        both = concatenate_datasets([rows, other])
        assert data_facts(both, None) == DataFacts(num_rows=len(both), split=data_facts(both, None).split)
        assert data_facts(both.to_iterable_dataset(), None).name is None


def test_rows_of_this_machine_have_no_name(tmp_path, hub_cache):
    """A folder has no name that means something to others, even if it is called like a Hub id."""
    folder = tmp_path / "user" / "MyPairs"
    Dataset.from_dict({"a": [1]}).save_to_disk(folder)
    local = Dataset.load_from_disk(str(folder))
    for name in (None, "user/MyPairs", str(folder), "./user/MyPairs", "data.parquet", "user/part-*.parquet", "a/b/c"):
        assert data_facts(local, name) == DataFacts(num_rows=1), name
    # The same layout as in the cache of `datasets`, without the Hub's own
    rows = prepared(tmp_path)
    (tmp_path / "hub" / "datasets--user--MyPairs").rename(tmp_path / "gone")
    assert data_facts(rows, None).name is None


def test_the_given_name_wins(tmp_path, hub_cache):
    """The commit of the rows belongs to it if they are of that dataset, and else what the user asked for."""
    rows = prepared(tmp_path)
    assert data_facts(rows, "user/MyPairs", "main") == FOUND
    other = data_facts(rows, "user/other", "v1")
    assert (other.name, other.revision, other.license) == ("user/other", "v1", None)
    assert data_facts(None, "user/other") == DataFacts("user/other")


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ({"license": "cc-by-4.0"}, "cc-by-4.0"),
        ({"license": ["mit", "apache-2.0"]}, "mit, apache-2.0"),
        ({"license": "other", "license_name": "some-license"}, "some-license"),
        ({"license": None}, None),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path, hub_cache, card, license):
    assert data_facts(prepared(tmp_path, **card), None).license == license


# ----- trackers -----


@pytest.fixture
def wandb(monkeypatch):
    forget_trackers()
    module = types.SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    forget_trackers()


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://wandb.ai/somebody/project/runs/abc", "https://wandb.ai/somebody/project/runs/abc"),
        ("https://wandb.ai/anony/p/runs/abc?apiKey=123#x", "https://wandb.ai/anony/p/runs/abc"),
        ("https://user:pw@wandb.example.com:8443/r/a b)", "https://wandb.example.com:8443/r/a%20b%29"),
        ("http://localhost:8080/p/runs/abc", None),
        ("http://127.0.0.1:8080/p", None),
        ("http://192.168.0.4/p", None),
        ("http://[::1]:80/p", None),
        ("http://wandb/p", None),
        ("http://node.internal/p", None),
        ("file:///home/somebody/wandb/offline-run", None),
        ("/home/somebody/wandb", None),
        ("javascript:alert(1)", None),
        ("", None),
        (None, None),
    ],
)
def test_only_public_addresses_are_said(wandb, url, public):
    """No machine, no file, no credentials."""
    wandb.run = types.SimpleNamespace(url=url)
    assert tracker_urls(["wandb"]) == ({"wandb": public} if public else {})
    assert tracker_urls([]) == {}


def test_addresses_outlive_the_run(wandb):
    """After `wandb.finish` the address is still known, and forgotten when another run begins."""
    wandb.run = types.SimpleNamespace(url="https://wandb.ai/a/b/runs/c")
    tracker_urls(["wandb"])
    wandb.run = None
    assert tracker_urls(["wandb"]) == {"wandb": "https://wandb.ai/a/b/runs/c"}
    forget_trackers()
    assert tracker_urls(["wandb"]) == {}


def test_addresses_of_spaces(monkeypatch):
    """TRL's own helpers find them; names of runs cannot break a link."""
    forget_trackers()
    space = 'https://somebody-space.hf.space?project=my project&runs=a"b)&sidebar=collapsed'
    monkeypatch.setattr(provenance, "get_trackio_space_url", lambda: space)
    monkeypatch.setattr(provenance, "get_comet_experiment_url", lambda: "https://www.comet.com/a/b/c")
    assert tracker_urls(["trackio", "comet_ml", "tensorboard"]) == {
        "trackio": "https://somebody-space.hf.space?project=my%20project&runs=a%22b%29&sidebar=collapsed",
        "comet": "https://www.comet.com/a/b/c",
    }
    forget_trackers()


# ----- machine and time -----


def test_hardware():
    """The device's name with the number of processes; a CPU has no name."""
    args = InstanceDPOConfig("out", report_to="none", use_cpu=True)
    assert hardware(args) == "CPU"
    with (
        patch.object(type(args), "device", property(lambda self: torch.device("cuda", 0))),
        patch.object(type(args), "world_size", property(lambda self: 2)),
        patch.object(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3"),
    ):
        assert hardware(args) == "2 x NVIDIA H100 80GB HBM3"


def test_seconds_of_a_resumed_run(tmp_path, monkeypatch):
    """Seven seconds a step: three steps, stopped after two, and one more, take as long as three in one run."""
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(
        "trl_diffusion.trainer.callbacks.time", types.SimpleNamespace(perf_counter=lambda: next(clock))
    )

    def train(steps: int, folder: str, **given) -> float | None:
        args = InstanceDPOConfig(
            str(tmp_path / folder), **tiny.FAST | {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        )
        trainer = InstanceDPOTrainer(
            tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora()
        )
        assert training_seconds(trainer.state) is None
        trainer.train(**given)
        return training_seconds(trainer.state)

    assert train(3, "whole") == 21
    assert train(2, "parts") == 14
    assert train(3, "parts", resume_from_checkpoint=True) == 21
    assert train(1, "whole") == 7  # another run


def test_no_seconds_without_a_training():
    assert training_seconds(TrainerState()) is None


def test_flags_and_their_defaults_exist():
    """The names that a recipe is made of are flags, and what is left out of it is a setting."""
    model = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(provenance.FLAGS_OF_MODEL.values()) <= model
    known = {field.name for kind in CONFIGS.values() for field in dataclasses.fields(kind)}
    assert NOT_IN_RECIPE <= known and set(provenance.NAMES) <= known
