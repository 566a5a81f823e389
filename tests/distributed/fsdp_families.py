# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Each family's denoiser before and after it is cut over two processes, which `test_fsdp.py` starts."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from tests import tiny
from tests.distributed.fsdp_runs import FsdpOnCpu
from tests.families import FAMILIES
from tests.families.test_laws import LORA, backbone_of, conditions_of, latents_for
from trl_diffusion.trainer.policy import make_policy
from trl_diffusion.trainer.sharding import gathered, shard


def step(backbone, policy: torch.nn.Module, conditions: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A prediction, and its gradient by the names of the weights."""
    policy.zero_grad()
    prediction = backbone.predict(policy, latents_for(backbone, 2), torch.tensor([100.0, 700.0]), conditions)
    prediction.square().mean().backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return prediction.detach(), {name: value.clone() for name, value in gathered(gradients, is_kept=True).items()}


def check(name: str, folder: Path, is_lora: bool, half_dtype: torch.dtype | None) -> None:
    """Raises an `AssertionError` where a denoiser that is cut differs from itself as a whole."""
    backbone = backbone_of(FAMILIES[name], folder)  # whose configuration resets accelerate's state
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if half_dtype else "no")
    conditions = conditions_of(backbone, ["a red circle", "a cat and a dog"], (32, 32))
    lora = tiny.lora(**LORA) if is_lora else None
    policy = make_policy(backbone.denoiser, lora, backbone.lora_target_modules, half_dtype, 0).train()
    with accelerator.autocast():
        prediction, gradient = step(backbone, policy, conditions)
    shard(policy, accelerator)
    weights = list(policy.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    assert sum(w.to_local().numel() for w in weights) < 0.55 * sum(w.numel() for w in weights)
    for _ in range(2):  # the first forward is also what settles the order of gathering
        again, its_gradient = step(backbone, policy, conditions)
        assert torch.equal(again.float(), prediction.float()), name
        assert gradient.keys() == its_gradient.keys() and gradient
        size = max(value.abs().max() for value in gradient.values())
        tolerance = 2e-2 if half_dtype else 1e-5
        for key, value in gradient.items():
            assert (its_gradient[key] - value).abs().max() <= tolerance * size, (name, key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with FsdpOnCpu():
        for name in FAMILIES:
            check(name, Path(sys.argv[1]), is_lora=False, half_dtype=None)
            check(name, Path(sys.argv[1]), is_lora=True, half_dtype=torch.bfloat16)
