# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
DeepSpeed trains, logs and saves what DDP does, and either continues the other. Real engines in two processes on the CPU: where
DeepSpeed is not installed, only what is said then is tested.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_available

from tests import tiny
from tests.cli.processes import run_distributed
from tests.distributed.zero_runs import zero_config
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, InstanceDPOConfig
from trl_diffusion.trainer.sharding import check_sharding


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
CASES = ("iapo-sd", "iapo-sd-bf16", "sft-sd-lora", "cpo-sd-lora")
STAGES = {"2": CASES[1:], "3": CASES}
# Sums in another order round differently; in half precision a rounded weight may be the next one
TOLERANCES = {"iapo-sd-bf16": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    pipeline = tiny.sd_pipeline()
    pipeline.text_encoder.save_pretrained(folder / "encoder")
    settings = {**tiny.FAST, "criteria": str(folder / "criteria.yaml"), "learning_rate": 0.05, "max_steps": 2}
    expert = AttributeSFTTrainer(
        pipeline,
        AttributeSFTConfig(str(folder / "sd"), **settings),
        train_dataset=tiny.paintings(8),
        peft_config=tiny.lora(),
    )
    expert.train()
    expert.save_model()
    return folder


def ends(folder: Path, kind: str, names: tuple[str, ...] = ()) -> list[dict]:
    """What both processes return."""
    for ended in run_distributed(["-m", "tests.distributed.zero_runs", folder, kind, *names]):
        assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def unsharded(folder) -> dict:
    return ends(folder, "ddp", CASES)[0]


def difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert weights.keys() == others.keys()
    return max((weights[name].float() - others[name].float()).abs().max().item() for name in weights)


def test_an_evaluation_before_the_training(tmp_path):
    """With DDP the processes still train together: both end on the same LoRA."""
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    first, second = ends(tmp_path, "ddp", ("sft-sd-lora",))
    assert difference(first["sft-sd-lora"]["weights"], second["sft-sd-lora"]["weights"]) == 0


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_equals_ddp(folder, unsharded, stage):
    """
    Weights after three steps of two micro-batches, with clipping and a schedule, are DDP's, and so are losses, norms of gradients,
    samples and evaluations, before the training too; resumed, also from DDP's checkpoint, and the other way round. Both processes end
    on the same; with ZeRO-3 each holds half.
    """
    first, second = ends(folder, stage, STAGES[stage])
    after = ends(folder, f"after-{stage}", STAGES[stage])[0]
    for name in STAGES[stage]:
        tolerance, expected = TOLERANCES.get(name, 2e-6), unsharded[name]
        runs = {"start": first[name], "own": first[name, stage], "ddp": first[name, "ddp"], "after": after[name]}
        for label, end in runs.items():
            assert difference(end["weights"], expected["weights"]) <= tolerance, (name, label)
            torch.testing.assert_close(end["losses"], expected["losses"], atol=10 * tolerance, rtol=10 * tolerance)
        assert difference(first[name]["weights"], second[name]["weights"]) == 0
        assert all(
            value.dtype == unsharded[name]["weights"][key].dtype for key, value in first[name]["weights"].items()
        )
        for one, other in zip(first[name]["logs"], expected["logs"], strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() & {"loss", "grad_norm", "learning_rate", "eval_loss", "rewards/margins"}:
                torch.testing.assert_close(one[key], other[key], atol=10 * tolerance, rtol=10 * tolerance)
        if stage == "3":
            local, whole = first[name]["bytes"]
            assert 0.5 * whole <= local <= 0.55 * whole


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_that_of_any_run(folder, unsharded, stage):
    """The same files with the same names and types, and in them what the training ended on: float32 where bf16 computes."""
    for name in STAGES[stage]:
        own, other = folder / stage / name, folder / "ddp" / name
        names = [{str(file.relative_to(each)) for file in each.rglob("*") if file.is_file()} for each in (own, other)]
        assert names[0] == names[1]
        file = next(
            file
            for file in names[0]
            if file.endswith("safetensors") and ("unet" in file or "lora" in file) and "ch" not in file
        )
        saved, expected = load_file(own / file), load_file(other / file)
        assert difference(saved, expected) <= TOLERANCES.get(name, 2e-6)
        assert {value.dtype for value in saved.values()} == {torch.float32}
        states = [torch.load(each / "checkpoint-2" / "optimizer.pt", weights_only=True) for each in (own, other)]
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for number, entries in states[0]["state"].items():
            torch.testing.assert_close(entries, states[1]["state"][number], atol=1e-3, rtol=1e-3)


@needs_deepspeed
@pytest.mark.slow
def test_details(folder):
    """
    Encoders are not cut, whoever loads them; the best weights are those of their checkpoint; a pipeline draws; a trainer trains once; a
    loss or a gradient that is not finite stops before the step, and is said with its rows.
    """
    first, second = ends(folder, "details")
    for found in (first, second):
        assert all(found["encoders"])
        name, weights, saved = found["best"]
        assert name == "checkpoint-1" and difference(weights, saved) == 0
        assert found["pipeline"] == (32, 32, 3)
    for what, said in (
        ("loss", "The loss is not finite in step 1"),
        ("gradient", "The gradient is not finite in step 1"),
    ):
        message, before, after = first[what]
        assert said in message and difference(before, after) == 0


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({}, {"stage": 1}, "ZeRO is 1, and the trainers support 2 and 3"),
        ({}, {"stage": 0}, "ZeRO is 0"),
        ({}, {"offload_optimizer": {"device": "cpu"}}, "`offload_optimizer` to cpu does not go"),
        ({}, {"offload_param": {"device": "nvme", "nvme_path": "/nvme"}}, "`offload_param` to nvme does not go"),
        ({"optim": "adafactor"}, {}, "'adafactor', whose state cannot be put together from shards. With DeepSpeed use one of"),
        ({"channels_last": True}, {}, "`channels_last=True` does not go with DeepSpeed"),
        ({"torch_compile": True}, {}, "`torch_compile=True` does not go with DeepSpeed"),
        ({"fp16": True}, {}, "float16 does not go with DeepSpeed"),
        ({"auto_find_batch_size": True}, {}, "`auto_find_batch_size=True` does not go with DeepSpeed"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, settings, config, message):
    """By one line, before a model is loaded."""
    args = InstanceDPOConfig(str(tmp_path), use_cpu=True, deepspeed=zero_config(**config), **settings)
    with pytest.raises(ValueError) as error:
        check_sharding(args)
    assert message in str(error.value)


@needs_deepspeed
@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has `optimizer`, which does not go"),
        ({"scheduler": {"type": "WarmupLR"}}, "has `scheduler`, which does not go"),
        ({"torch_autocast": {"enabled": True}}, "has `torch_autocast`, which does not go"),
        ({"gradient_accumulation_steps": 4}, "`gradient_accumulation_steps` 4, and `gradient_accumulation_steps` of the trainer is 1"),
        ({"gradient_clipping": 0.1}, "`gradient_clipping` 0.1, and `max_grad_norm` of the trainer is 1.0"),
        ({"train_micro_batch_size_per_gpu": 3}, "3, and `per_device_train_batch_size` of the trainer is 8"),
    ],
)  # fmt: skip
def test_refused_sections(tmp_path, added, message):
    """Of DeepSpeed's own configuration, which would train something else than the flags say."""
    args = InstanceDPOConfig(str(tmp_path), use_cpu=True, deepspeed={**zero_config(2), **added})
    with pytest.raises(ValueError) as error:
        check_sharding(args)
    assert message in str(error.value)


def test_deepspeed_that_is_not_installed(tmp_path, monkeypatch):
    """Is told with the command that installs it, whichever way DeepSpeed is asked for."""
    monkeypatch.setattr("trl_diffusion.trainer.diffusion_config.is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match="pip install 'trl-diffusion\\[deepspeed\\]'"):
        InstanceDPOConfig(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="pip install 'trl-diffusion\\[deepspeed\\]'"):
        InstanceDPOConfig(str(tmp_path))
