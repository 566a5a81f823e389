# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Computes the memory of a training step without running it: `python -m tests.benchmark.memory [--output FILE.json]`.

The real modules of diffusers and peft take two training steps on fake tensors, which have shapes and types and no memory,
while a dispatch mode adds up the storages that are alive. The second step's peak is reported, when the optimizer has its
state. Fake tensors are on the CPU here; what autocast does differently on CUDA (norms in float32) is imitated, and
attention is the fused one on both. Not counted: the CUDA context, workspaces of libraries, and what the allocator loses.
"""

import argparse
import copy
import json
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmark.models import sd15_unet, sdxl_unet
from tests.benchmark.steps import dpo_loss, predict
from trl_diffusion.quickstart.sampling import shipped


GIB = 2**30
PARTS = ["weights", "gradients", "optimizer", "activations"]


@dataclass
class Case:
    """What is trained. `optimizer_bytes` a parameter are added by hand where the optimizer is not run."""

    title: str
    unet: Callable[[], UNet2DConditionModel]
    text_width: int
    lora_rank: int | None
    optimizer_bytes: float | None
    gradient_checkpointing: bool


CASES = [
    Case("SDXL, LoRA of rank 64, 1024 px", sdxl_unet, 2048, 64, None, True),
    Case("SD 1.5, all weights, 512 px, 8-bit Adam", sd15_unet, 768, None, 2.0, True),
]


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, by part, and keeps the parts at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = Counter(), Counter()
        self.live = {}  # storage: a reference that notices its end, its part, its size

    def put(self, tensor: torch.Tensor, part: str) -> None:
        """Counts a tensor's storage, or moves it to another part."""
        storage = tensor.untyped_storage()
        self.forget(storage._cdata)
        key = storage._cdata
        self.live[key] = (weakref.ref(storage, lambda _: self.forget(key)), part, storage.nbytes())
        self.now[part] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def forget(self, key: int) -> None:
        if key in self.live:
            _, part, size = self.live.pop(key)
            self.now[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self.put(tensor, "activations")
        return result

    def watch(self, module: torch.nn.Module) -> None:
        """Counts a module's parameters and buffers, and gradients as they come."""
        for buffer in module.buffers():
            self.put(buffer, "weights")
        for parameter in module.parameters():
            self.put(parameter, "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.put(p.grad, "gradients"))


def float_norm(norm: Callable) -> Callable:
    """A norm as CUDA's autocast runs it: in float32."""

    def run(*args, **kwargs):
        return norm(*(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

    return run


def pair_batch(unet: UNet2DConditionModel, text_width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Noised latents, timesteps, noise and conditions of one pair, as cached training has them: float32."""
    size = unet.config.sample_size
    conditions = {"prompt_embeds": torch.empty(2, 77, text_width)}
    if unet.config.addition_embed_type == "text_time":
        conditions |= {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    return torch.empty(2, 4, size, size), torch.zeros(2, dtype=torch.long), torch.empty(2, 4, size, size), conditions


def policy_and_reference(case: Case) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The trained module, and a frozen copy of it where the reference is not the policy without its LoRA."""
    with torch.device("meta"):
        unet = case.unet()
        if case.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if case.lora_rank is None:
            reference = copy.deepcopy(unet).requires_grad_(False).train()
            for module in reference.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    module.to(torch.bfloat16)  # as the trainer holds it
            return unet.train(), reference
        unet.requires_grad_(False).to(torch.bfloat16)
        config = LoraConfig(
            r=case.lora_rank, lora_alpha=case.lora_rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
        return get_peft_model(unet, config).train(), None


def make_fake(module: torch.nn.Module) -> None:
    """Turns a module's parameters and buffers on the meta device into fake ones on the CPU; what is shared stays shared."""
    made = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[parameter] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
                submodule._parameters[name] = made[parameter]
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def training_step(policy, reference, batch, optimizer) -> None:
    noisy_latents, timesteps, noise, conditions = batch
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), policy.disable_adapter() if reference is None else nullcontext():
            ref_pred = predict(reference or policy, noisy_latents, timesteps, conditions)
        loss = dpo_loss(predict(policy, noisy_latents, timesteps, conditions), ref_pred, noise)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    else:
        policy.zero_grad()


def compute(case: Case) -> dict[str, object]:
    """GiB of each part at the peak of a training step."""
    policy, reference = policy_and_reference(case)
    tracker = LiveBytes()
    with (
        FakeTensorMode(),
        mock.patch.object(F, "group_norm", float_norm(F.group_norm)),
        mock.patch.object(F, "layer_norm", float_norm(F.layer_norm)),
    ):
        for module in (policy, reference):
            if module is not None:
                make_fake(module)
                tracker.watch(module)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True) if case.optimizer_bytes is None else None
        batch = pair_batch(policy if case.lora_rank is None else policy.base_model.model, case.text_width)
        for tensor in tree_leaves(batch):
            tracker.put(tensor, "activations")
        with tracker:
            training_step(policy, reference, batch, optimizer)
            for tensor in tree_leaves(optimizer.state_dict()) if optimizer else []:
                if isinstance(tensor, torch.Tensor):
                    tracker.put(tensor, "optimizer")
            tracker.peak = Counter()
            training_step(policy, reference, batch, optimizer)
    num_trained = sum(p.numel() for p in trained)
    parts = {part: tracker.peak[part] for part in PARTS}
    parts["optimizer"] += num_trained * (case.optimizer_bytes or 0)
    return {
        "case": case.title,
        "trained_parameters": num_trained,
        **{f"{part}_gib": size / GIB for part, size in parts.items()},
        "total_gib": sum(parts.values()) / GIB,
        "how": "computed on fake tensors, not measured",
    }


def check() -> dict[str, int]:
    """What is counted after a forward of the quickstart's UNet, beside sums that need no counting of storages."""
    config = UNet2DConditionModel.load_config(shipped("base_pipeline"), subfolder="unet")
    tracker, saved = LiveBytes(), {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        unet = UNet2DConditionModel.from_config(config).train()
        noisy_latents, timesteps, _, conditions = pair_batch(unet, config["cross_attention_dim"])
        tracker.watch(unet)
        given = (noisy_latents, timesteps, *conditions.values())
        for tensor in given:
            tracker.put(tensor, "given")
        with tracker, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = predict(unet, noisy_latents, timesteps, conditions)
        for tensor in (*unet.parameters(), *given, prediction):
            saved.pop(tensor.untyped_storage()._cdata, None)
    return {
        "weights_counted": tracker.now["weights"],
        "weights_summed": sum(p.numel() * p.element_size() for p in unet.parameters()),
        "activations_counted": tracker.now["activations"] - prediction.untyped_storage().nbytes(),
        "activations_saved_for_backward": sum(tensor.untyped_storage().nbytes() for tensor in saved.values()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast
    checks = check()
    print(", ".join(f"{name} {size} bytes" for name, size in checks.items()))
    results = [compute(case) for case in CASES]
    print("\nOne pair (two images), bfloat16 autocast, gradient checkpointing. Computed, not measured, in GiB:\n")
    print("| training | " + " | ".join(PARTS) + " | total |\n|---|" + "---|" * (len(PARTS) + 1))
    for result in results:
        sizes = [result[f"{part}_gib"] for part in (*PARTS, "total")]
        print(f"| {result['case']} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")
    if args.output:
        args.output.write_text(json.dumps({"torch": torch.__version__, "check": checks, "results": results}, indent=2))


if __name__ == "__main__":
    main()
