# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is refused of sharded trainings; what they compute is in `tests/distributed/test_fsdp.py`."""

import pytest
from transformers.training_args import OptimizerNames

from tests import tiny
from tests.cli.processes import run_distributed
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.trainer.sharding import blocks, check_sharding


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def two_processes(monkeypatch):
    """A run of two processes, as far as its configuration knows."""
    monkeypatch.setattr(InstanceDPOConfig, "world_size", 2)


def config(folder, **settings) -> InstanceDPOConfig:
    return InstanceDPOConfig(str(folder), **{**tiny.FAST, "use_cpu": True, "bf16": False} | settings)


@pytest.mark.parametrize(
    "environment, settings, message",
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP version 1 is not supported. Set `fsdp_version: 2`"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "would leave the text encoders without weights"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "`activation_checkpointing` of the trainer does the same"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "`fsdp_offload_params` does not go with these trainers"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "would leave weights whole after they were used"),
        ({"FSDP_IGNORED_MODULES": "conv_in"}, {}, "`fsdp_ignored_modules` would leave weights"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "does not know the blocks of a denoiser"),
        ({}, {"mixed_precision": "fp16"}, "float16 does not go with FSDP here. Use `bf16=True`."),
        ({}, {"torch_compile": True}, "`torch_compile=True` does not go with FSDP"),
        ({}, {"channels_last": True}, "`channels_last=True` does not go with FSDP"),
        ({}, {"auto_find_batch_size": True}, "`auto_find_batch_size=True` does not go with FSDP"),
        (
            {},
            {"optim": OptimizerNames.ADAFACTOR},
            "`optim` is 'adafactor', whose state cannot be put together from shards",
        ),
    ],
)
def test_what_does_not_go_with_fsdp(tmp_path, monkeypatch, two_processes, environment, settings, message):
    """Before a model is loaded, one line says what it is and what to do; without it, nothing is said."""
    for name, value in (FSDP2 | environment).items():
        monkeypatch.setenv(name, value)
    args = config(tmp_path)
    for name, value in settings.items():  # which the configuration itself may refuse on the CPU
        setattr(args, name, value)
    with pytest.raises(ValueError) as error:
        check_sharding(args)
    assert message in str(error.value) and "\n" not in str(error.value)
    for name in environment:
        monkeypatch.delenv(name)
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    check_sharding(config(tmp_path))


def test_one_process_is_not_sharded(tmp_path, monkeypatch):
    """Asked for by the launcher, one process ends before a model is loaded."""
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="This run asks for FSDP, and nothing would be sharded in one process"):
        InstanceDPOTrainer("no/such-model", args=config(tmp_path), train_dataset=tiny.pairs(2))


SCRIPT = """
import sys
from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer

args = InstanceDPOConfig(sys.argv[1], **{**tiny.FAST, "use_cpu": True})
try:
    InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(2))
except ValueError as error:
    print(error)
"""


def test_fsdp_on_the_cpu_is_refused(tmp_path, monkeypatch):
    """Where accelerate makes DDP of it in silence, each process says that nothing would be sharded."""
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    for ended in run_distributed(["-c", SCRIPT, tmp_path]):
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("This run asks for FSDP, and nothing would be sharded on the CPU"), ended.stdout


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_the_blocks_that_are_gathered_at_a_time(family):
    """Each tiny model has some of the classes that diffusers names, and they hold most of its weights."""
    pipeline = tiny.PIPELINES[family]()
    denoiser = pipeline.unet if family in tiny.UNETS else pipeline.transformer
    names = blocks(denoiser)
    inside = {id(w) for m in denoiser.modules() if type(m).__name__ in names for w in m.parameters()}
    weights = list(denoiser.parameters())
    assert sum(w.numel() for w in weights if id(w) in inside) > 0.5 * sum(w.numel() for w in weights)


SHARDS = """
import copy
import torch
from torch.distributed.fsdp import fully_shard
from trl_diffusion.trainer.sharding import OPTIMIZERS, cut_as, gathered, load_optimizer_state, whole_optimizer_state

torch.distributed.init_process_group("gloo")
is_main = torch.distributed.get_rank() == 0
KINDS = {
    "adamw_torch": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}
assert KINDS.keys() == {*OPTIMIZERS}

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))  # 5 rows and 1 in two processes

def step(model, optimizer, number):
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

for kind, make in KINDS.items():
    plain, sharded, resumed = model(), fully_shard(model()), fully_shard(model())
    own, other, third = (make(each.parameters()) for each in (plain, sharded, resumed))
    for number in range(3):
        step(plain, own, number)
        step(sharded, other, number)
    state = whole_optimizer_state(other, is_kept=True)
    assert whole_optimizer_state(other, is_kept=False)["state"][0] == {}
    for values, wanted in zip(state["state"].values(), own.state_dict()["state"].values(), strict=True):
        assert values.keys() == wanted.keys()
        for name in values:
            torch.testing.assert_close(values[name], wanted[name], msg=f"{kind} {name}")
    weights = gathered(sharded.state_dict(), is_kept=True)
    assert gathered(sharded.state_dict(), is_kept=False) == {}
    resumed.load_state_dict(cut_as(resumed.state_dict(), weights))
    load_optimizer_state(third, copy.deepcopy(state))  # as from a file
    step(plain, own, 3), step(sharded, other, 3), step(resumed, third, 3)
    ends = [gathered(each.state_dict(), is_kept=True) for each in (plain, sharded, resumed)]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, msg=kind)
        assert torch.equal(ends[1][name], ends[2][name]), kind
torch.distributed.destroy_process_group()
"""


def test_whole_weights_and_states_of_uneven_shards():
    """
    Of layers whose rows two processes cannot share evenly, one of which has a single row: the state of each optimizer that is let in
    is that of an unsharded one, and loaded into another sharded one it goes on from there.
    """
    for ended in run_distributed(["-c", SHARDS]):
        assert ended.returncode == 0, ended.stderr
