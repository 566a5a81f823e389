# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a step does not do, and what may not change because of it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from tests import tiny
from tests.tiny import FAST, losses
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


def make_trainer(tmp_path, peft_config=None, pipeline=None, **kwargs) -> InstanceDPOTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        **FAST,
        "learning_rate": 1e-4,
        "beta": 50.0,
        "max_steps": 4,
        "use_cpu": True,
    }
    return InstanceDPOTrainer(
        pipeline or tiny.sd_pipeline(),
        args=InstanceDPOConfig(**{**defaults, **kwargs}),
        train_dataset=tiny.pairs(),
        peft_config=peft_config,
    )


def count_rows(module: torch.nn.Module, name: str, monkeypatch) -> list[int]:
    """The batch sizes that a method of a module is called with."""
    rows, method = [], getattr(module, name)

    def counted(batch, *args, **kwargs):
        rows.append(len(batch))
        return method(batch, *args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return rows


def test_one_encoding_and_two_forwards_a_step(tmp_path, monkeypatch):
    """Both images are one batch for VAE, policy and reference, and a prompt that two rows share is encoded once."""
    trainer = make_trainer(tmp_path, max_steps=1)
    vae, text = (getattr(trainer.backbone.pipeline, name) for name in ("vae", "text_encoder"))
    images = count_rows(vae, "encode", monkeypatch)
    prompts = count_rows(text, "forward", monkeypatch)
    policy, reference = (
        count_rows(model, "forward", monkeypatch) for model in (trainer.model, trainer.reference.denoiser)
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 2, 4)])
    assert len(set(batch["prompt"])) == 1
    trainer.compute_loss(trainer.model, batch)
    assert images == policy == reference == [6] and prompts == [1]


def test_a_repeated_prompt_has_the_embedding_that_it_has_alone(tmp_path):
    """Encoding each prompt once and spreading the result is encoding all of them."""
    trainer = make_trainer(tmp_path)
    prompts = ["a cat", None, "a dog", "a cat", "", "a dog", None]
    together = trainer.encoder.encode_prompts(prompts)["prompt_embeds"]
    for prompt, embedding in zip(prompts, together, strict=True):
        alone = trainer.encoder.encode_prompts([prompt])["prompt_embeds"][0]
        torch.testing.assert_close(embedding, alone, atol=1e-6, rtol=1e-6)


def test_nothing_is_gathered_between_two_logs(tmp_path, monkeypatch):
    """Metrics of two micro-batches a step and three steps a log cross processes when they are logged, and only then."""
    steps = []
    for name in ("reduce", "gather", "gather_for_metrics", "pad_across_processes"):
        method = getattr(Accelerator, name)

        def counted(*args, method=method, **kwargs):
            steps.append(trainer.state.global_step)
            return method(*args, **kwargs)

        monkeypatch.setattr(Accelerator, name, counted)
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert set(steps) == {3, 6}


def test_the_reference_of_a_lora_is_peft_with_its_adapters_off(tmp_path):
    """What `reference` lends predicts what peft's `disable_adapter` gives, and the adapters are on again, error or not."""
    trainer = make_trainer(tmp_path, LoraConfig(r=4, lora_alpha=8))
    model = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 12, 16))
    on = model(*inputs).sample
    with torch.no_grad(), model.disable_adapter():
        off = model(*inputs).sample
    with pytest.raises(RuntimeError, match="in between"), trainer.reference.lend(model) as reference:
        assert torch.equal(reference(*inputs).sample, off)
        assert not torch.is_grad_enabled()
        raise RuntimeError("in between")
    assert torch.equal(model(*inputs).sample, on) and (on - off).abs().max() > 1e-3
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_the_frozen_copy_holds_its_matrices_in_the_precision_of_autocast(tmp_path):
    """Under bf16 the reference's convolutions and projections are bf16, all else is float32; without it everything is."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        trainer = make_trainer(tmp_path, bf16=bf16)
        modules = [module for module in trainer.reference.denoiser.modules() if not list(module.children())]
        for module in modules:
            for parameter in module.parameters():
                assert parameter.dtype == (expected if isinstance(module, kinds) else torch.float32)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_channels_last_changes_the_layout_and_nothing_else(tmp_path, peft_config):
    """Convolutions have their channels last, and the losses are those of the other layout to rounding."""
    trainer = make_trainer(tmp_path, peft_config, channels_last=True)
    for module in (*trainer.model.modules(), *trainer.backbone.pipeline.vae.modules()):
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    trainer.train()
    plain = make_trainer(tmp_path, peft_config)
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-4)


def test_workers_read_ahead_where_there_is_a_gpu(tmp_path, monkeypatch):
    """Four processes with a GPU, none without, and what the user says in any case."""
    assert InstanceDPOConfig(str(tmp_path), use_cpu=True).dataloader_num_workers == 0
    assert InstanceDPOConfig(str(tmp_path), dataloader_num_workers=2).dataloader_num_workers == 2
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr("trl_diffusion.trainer.diffusion_config.torch", SimpleNamespace(cuda=cuda))
    assert InstanceDPOConfig(str(tmp_path), use_cpu=True, bf16=False).dataloader_num_workers == 0
    config = InstanceDPOConfig(str(tmp_path), bf16=False, dataloader_pin_memory=False)
    assert config.dataloader_num_workers == 4 and not config.accelerator_config.non_blocking


def test_workers_read_what_no_worker_would(tmp_path):
    """With two processes that read ahead the losses are the same."""
    trainer, plain = make_trainer(tmp_path, dataloader_num_workers=2), make_trainer(tmp_path)
    trainer.train()
    plain.train()
    assert losses(trainer) == losses(plain)
