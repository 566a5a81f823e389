# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Time and memory of one arm's steps, each beside a floor and a yardstick."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ForwardCounter:
    """Counts the rows that denoisers are asked about without gradient."""

    def __init__(self):
        self.rows = 0

    def watch(self, denoiser: torch.nn.Module) -> None:
        """Counts a denoiser and the copies that are made of it."""

        def count(module, args):
            if not torch.is_grad_enabled():
                self.rows += len(args[0])

        # Called by whatever wraps the denoiser, and never recomputed
        first = denoiser.conv_in if isinstance(denoiser, UNet2DConditionModel) else denoiser.pos_embed
        first.register_forward_pre_hook(count)


class PeakMemory:
    """Bytes that PyTorch had allocated on a GPU, or that the process had in memory without one, at most since `reset`."""

    def __init__(self, device: str):
        self.is_cuda, self.is_known = device == "cuda", True

    def reset(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is in memory now
        except OSError:
            self.is_known = False

    def read(self) -> int | None:
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        if not self.is_known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


@dataclass
class Rounds:
    """Seconds of each round, peak memory in bytes and forwards without gradient an image, warm-up left out."""

    arm: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)
    peak_memory: list[int | None] = field(default_factory=list)
    no_grad_rows: list[int] = field(default_factory=list)

    def without_warm_up(self, num_rounds: int) -> "Rounds":
        return Rounds(**{name: values[num_rounds:] for name, values in vars(self).items()})

    def ratio_to_floor(self) -> float:
        return statistics.median(arm / floor for arm, floor in zip(self.arm, self.floor, strict=True))

    def ratio_to_yardstick(self) -> float:
        return statistics.median(arm / yardstick for arm, yardstick in zip(self.arm, self.yardstick, strict=True))


class Stopwatch:
    """
    Times rounds: a step of the arm, then the floor, then the yardstick, each for the same number of pairs.

    Args:
        device: `"cpu"` or `"cuda"`.
        floor: Runs the floor once, and leaves no gradients behind.
        yardstick: Runs the yardstick once.
        counter: Counts forwards.
    """

    def __init__(self, device: str, floor: Callable, yardstick: Callable, counter: ForwardCounter):
        self.device, self.floor, self.yardstick, self.counter = device, floor, yardstick, counter
        self.memory, self.rounds = PeakMemory(device), Rounds()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, function: Callable) -> float:
        start = self.now()
        function()
        return self.now() - start

    def start(self) -> None:
        self.memory.reset()
        self.counter.rows = 0
        self.started = self.now()

    def stop(self) -> None:
        """Ends the arm's step, and runs floor and yardstick."""
        self.rounds.arm.append(self.now() - self.started)
        self.rounds.no_grad_rows.append(self.counter.rows)
        self.rounds.peak_memory.append(self.memory.read())
        self.rounds.floor.append(self.time(self.floor))
        self.rounds.yardstick.append(self.time(self.yardstick))


class StopwatchCallback(TrainerCallback):
    """Times a trainer's steps from one to the next, with all that lies between."""

    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopwatch.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopwatch.stop()
        self.stopwatch.start()
