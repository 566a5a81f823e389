# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Faults that other implementations of these objectives had. Those that are tested elsewhere: one lambda of the safeguard for a whole
micro-batch (`tests/test_safeguards.py`, `test_one_lambda_for_each_pair`; in training, `test_accumulation_changes_nothing` of
`test_pair_losses.py`), and one KL for each micro-batch or process (`test_diffusion_kto_trainer.py`).
"""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig

from tests import tiny
from tests.cli.processes import run_distributed
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone


def make_trainer(
    folder: Path, family: str = "sd", peft_config: LoraConfig | None = None, num_rows: int = 4, **settings
):
    pipeline = tiny.PIPELINES[family]()
    args = InstanceDPOConfig(str(folder), **{**tiny.FAST, **tiny.settings(pipeline), "use_cpu": True, **settings})
    return InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(num_rows), peft_config=peft_config)


# ---- prompt dropout that is unequal on the two sides of a pair ----


@pytest.mark.parametrize("cached", ["nothing", "prompts", "reference"])
@pytest.mark.parametrize(
    ("family", "peft_config"), [("sd", tiny.lora()), ("sdxl", None)], ids=["sd-lora", "sdxl-full"]
)
def test_a_dropped_prompt_is_dropped_for_both_images_and_both_models(tmp_path, family, peft_config, cached):
    """Policy and reference, chosen and rejected: all four predictions of a pair are for its prompt, or all for none."""
    settings = {"prompt_dropout": 0.5, "per_device_train_batch_size": 4, "precompute": cached != "nothing"}
    settings |= {"precompute_ref_preds": cached == "reference", "precompute_dir": str(tmp_path / "cache")}
    trainer = make_trainer(tmp_path, family, peft_config, **settings)
    of_none = load_backbone(tiny.PIPELINES[family]()).encode_prompts([None])
    are_dropped, asked, predict = [], [], trainer.predict_with_policy

    def note_prompts(module, args, kwargs):
        asked.append(kwargs["encoder_hidden_states"])

    def checked(model, noised):
        conditions = noised.batch["conditions"]
        with trainer.reference.lend(model) as reference:
            expected = trainer._predict(reference, noised)
        torch.testing.assert_close(noised.frozen["ref_pred"], expected, atol=1e-5, rtol=0)
        with trainer.policy.register_forward_pre_hook(note_prompts, with_kwargs=True):
            model_pred = predict(model, noised)
        assert torch.equal(asked.pop(), conditions["prompt_embeds"])
        for name, unconditional in of_none.items():
            chosen, rejected = conditions[name].chunk(2)
            assert torch.equal(chosen, rejected)
            are_dropped.append((chosen == unconditional).flatten(1).all(dim=1).tolist())
        return model_pred

    trainer.predict_with_policy = checked
    trainer.train()
    assert len(are_dropped) == 3 * len(of_none)
    assert {True, False} == {is_dropped for batch in are_dropped for is_dropped in batch}


# ---- a reference that drifts after a resume ----


def reference_predictions(trainer: InstanceDPOTrainer) -> torch.Tensor:
    with trainer.reference.lend(trainer.policy) as reference:
        return tiny.predictions(trainer.backbone, reference)


@pytest.mark.parametrize("kind", ["base of a LoRA", "initial LoRA", "copy of all weights"])
def test_a_resumed_run_has_the_reference_it_started_with(tmp_path, kind):
    """To the last bit, when the trainer is made again, after the checkpoint is loaded, and at the end."""
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.02}
    if kind == "initial LoRA":
        first = make_trainer(tmp_path / "first", peft_config=tiny.lora(), learning_rate=0.1)
        first.train()
        first.save_model()
        settings["initial_lora"] = str(tmp_path / "first")
    peft_config = tiny.lora() if kind == "base of a LoRA" else None
    whole = make_trainer(tmp_path, peft_config=peft_config, **settings)
    expected = reference_predictions(whole)
    whole.train()
    resumed = make_trainer(tmp_path, peft_config=peft_config, **settings)
    assert torch.equal(reference_predictions(resumed), expected)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trainer in (whole, resumed):
        assert torch.equal(reference_predictions(trainer), expected)
        assert (tiny.predictions(trainer.backbone, trainer.policy) - expected).abs().max() > 1e-3
    errors = [[entry.get("errors/ref_chosen") for entry in each.state.log_history] for each in (whole, resumed)]
    assert len(errors[0]) == 4 and errors[0] == errors[1]  # a resumed run keeps the logs of its checkpoint


# ---- time ids of SDXL that belong to other rows, or have another batch size ----


@pytest.mark.parametrize("precompute", [False, True])
def test_the_time_ids_of_sdxl_are_those_of_their_rows(tmp_path, precompute):
    """
    Chosen and rejected images of other sizes and crops, grouped instances, and a last micro-batch of one row: policy and reference
    are told of each image its own size, the place of its crop, and the size that is trained at.
    """
    settings = {"size_conditions": "original", "grouped_instances": True, "gradient_accumulation_steps": 2}
    settings |= {"precompute": precompute, "precompute_dir": str(tmp_path / "cache")}
    trainer = make_trainer(tmp_path, "sdxl", tiny.lora(), num_rows=5, **settings)
    ids, asked, prepare_batch = [], [], trainer.prepare_batch

    def noted(inputs, latents):
        ids.append(inputs["id"])
        return prepare_batch(inputs, latents)

    trainer.prepare_batch = noted
    trainer.policy.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    trainer.train()
    images = {row["id"]: row for row in tiny.pairs(5)}

    def time_ids(width: int, height: int) -> list[int]:
        left, top = ((side * 32 // min(width, height) - 32) // 2 for side in (width, height))
        return [height, width, top, left, 32, 32]

    expected = [
        [time_ids(*images[row_id][name].size) for name in trainer.image_columns for row_id in batch] for batch in ids
    ]
    assert {len(batch) for batch in ids} == {1, 2}
    assert asked == [batch for batch in expected for _ in ("reference", "policy")]


# ---- what a loss computes over a batch, and each process for itself ----

CUT = {
    "safeguard": {"safeguard_mu": 0.5, "anchor_alpha": 10.0},
    "grouped": {"grouped_instances": True},
    "dspo": {"loss_type": "dspo", "beta": 0.5},
}


def train_all(folder: Path, batch_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Where each training starts, and what it moved: 7 rows, so that a step of 4 has 3 of them."""
    ends = {}
    for name, settings in CUT.items():
        sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05, "per_device_train_batch_size": batch_size}
        trainer = make_trainer(folder / name, peft_config=tiny.lora(), num_rows=7, **{"beta": 20.0} | sgd | settings)
        before = tiny.weights(trainer.policy)
        trainer.train()
        ends[name] = {key: value - before[key] for key, value in tiny.weights(trainer.policy).items()}
    return ends


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """A safeguard, an anchor, the terms of instances and DSPO's step follow from each pair, wherever it is computed."""
    for ended in run_distributed(["-m", "tests.trainer.test_faults_of_others", tmp_path]):
        assert ended.returncode == 0, ended.stderr
    two = [torch.load(tmp_path / f"process-{rank}.pt") for rank in (0, 1)]
    one = train_all(tmp_path / "one", 4)
    for name in CUT:
        assert tiny.max_difference(two[0][name], two[1][name]) == 0
        assert tiny.max_difference(one[name], two[0][name]) <= 1e-6
        assert max(value.abs().max() for value in one[name].values()) > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ends = train_all(folder / "two", 2)
    torch.save(ends, folder / f"process-{PartialState().process_index}.pt")
