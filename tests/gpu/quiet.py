# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Does the host wait for the GPU between optimizer steps? Waits and blocking copies of the micro-batches of one step, counted.

On a GPU, PyTorch warns of each operation that waits (`torch.cuda.set_sync_debug_mode`), and each warning's line is noted; in
another step the profiler counts `cudaStreamSynchronize`, and copies from or to memory that is not pinned, which hold up the
host too. On the CPU, what is counted would wait if its tensors were on a GPU: numbers that are read, `nonzero`, masks as
indices, lists that become tensors on a device. Collation, the words that prompts lose, and the sampling of timesteps are the
host's and do not count; copies of tensors from one device to another cannot be seen there.

A step's micro-batches last from the end of the step before until their gradients are clipped; they include what is done to
fetch them. What is left is counted beside them: the optimizer's step, and before it the check that losses and gradients are
finite, which waits once so that weights are never lost.
"""

import argparse
import json
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tests.benchmark.arms import release
from tests.gpu.record import Record, figure, stage_args
from tests.gpu.right import OBJECTIVES, OTHERS, PAPERS, make_trainer


TORCH = Path(torch.__file__).parent
MICRO_BATCHES = 4
ROWS = 2 * MICRO_BATCHES * 4  # four steps of micro-batches of two
WINDOWS = ("micro-batches", "optimizer step")
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def is_on_the_host(frames: list[traceback.FrameSummary]) -> bool:
    """Whether this is work whose tensors are on the CPU in every training: collation, prompts, and the sampling of timesteps."""
    on_the_host = ("/data/collators.py", "/degraded_prompts.py")
    return any(frame.filename.endswith(on_the_host) or frame.name == "sample_timesteps" for frame in frames)


def calling_line(frames: list[traceback.FrameSummary]) -> str:
    """The innermost line outside of PyTorch, after that of this library which led to it."""
    frames = [frame for frame in frames if frame.filename != __file__]
    own = [frame for frame in frames if "/trl_diffusion/" in frame.filename][-1:]
    innermost = [frame for frame in frames if TORCH not in Path(frame.filename).parents][-1:]
    lines = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in own + innermost]
    return " > ".join(dict.fromkeys(lines))


def count_line(lines: Counter[str], what: str) -> None:
    frames = traceback.extract_stack()
    if not is_on_the_host(frames):
        lines[f"{calling_line(frames)} {what}"] += 1


class CountedOperations(TorchDispatchMode):
    """Counts the lines with operations that read numbers from tensors."""

    def __init__(self, lines: Counter[str]):
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in WAITING or masks:
            count_line(self.lines, func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class CountedCalls(TorchFunctionMode):
    """Counts the lines that make tensors of numbers on a device, or take tensors to the host, where no operation tells."""

    def __init__(self, lines: Counter[str]):
        super().__init__()
        self.lines = lines

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if makes or func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            count_line(self.lines, func.__name__)
        return func(*args, **kwargs)


class WaitingOperations:
    """Counts what would wait for a GPU, on the CPU."""

    def __init__(self):
        self.lines: Counter[str] = Counter()

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(CountedOperations(self.lines))
        self.stack.enter_context(CountedCalls(self.lines))
        return self

    def __exit__(self, *exception):
        self.stack.close()


class SyncWarnings:
    """Counts the lines that PyTorch says wait for the GPU."""

    def __init__(self):
        self.lines: Counter[str] = Counter()

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self.note  # `catch_warnings` puts the former one back
        torch.cuda.set_sync_debug_mode("warn")
        self.lines.clear()  # it warns of itself
        return self

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")
        self.stack.close()

    def note(self, message, *args, **kwargs) -> None:
        if "called a synchronizing" in str(message):
            self.lines[calling_line(traceback.extract_stack())] += 1


class Windows(TrainerCallback):
    """
    Opens a context for a step's micro-batches, and another for its optimizer's step.

    Args:
        step: The number of the step.
        open_window: From the window's name to its context.
    """

    def __init__(self, step: int, open_window: Callable[[str], object]):
        self.step, self.open_window = step, open_window
        self.stack = ExitStack()

    def turn(self, window: str | None) -> None:
        self.stack.close()
        if window:
            self.stack.enter_context(self.open_window(window))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.step - 1, self.step):
            self.turn(WINDOWS[0] if state.global_step < self.step else None)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.turn(WINDOWS[1])


class ProfiledStep(TrainerCallback):
    """Profiles a step from the end of the one before to the beginning of the next."""

    def __init__(self, step: int):
        self.step = step
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.profiler.start()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.profiler.stop()

    def events(self) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            self.profiler.export_chrome_trace(f"{folder}/trace.json")
            return json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]


def profiled_counts(events: list[dict], window: str) -> dict[str, int]:
    """Calls that wait, and copies that are not from or to pinned memory, which were called within a window."""
    (span,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == window)
    called = [
        event
        for event in events
        if event.get("cat") == "cuda_runtime" and span["ts"] <= event["ts"] <= span["ts"] + span["dur"]
    ]
    numbers = {event["args"].get("correlation") for event in called}
    copies = [
        event["name"]
        for event in events
        if event.get("cat") == "gpu_memcpy" and event["args"].get("correlation") in numbers
    ]
    counts = Counter(event["name"] for event in called if event["name"] in WAITS)
    return dict(counts + Counter(name for name in copies if "Pageable" in name))


def count(objective: str, kind: str, is_lora: bool, precomputed: list[str], device: str) -> dict:
    """Waits in a step of a tiny training."""
    counting = {window: SyncWarnings() if device == "cuda" else WaitingOperations() for window in WINDOWS}
    settings = {
        "gradient_accumulation_steps": MICRO_BATCHES,
        "max_steps": 4,
        "logging_steps": 1000,
        **dict.fromkeys(precomputed, True),
    }
    callbacks, precision, profiled = [Windows(2, counting.__getitem__)], "fp32", ProfiledStep(3)
    if device == "cuda":
        callbacks, precision = [*callbacks, profiled, Windows(3, record_function)], "bf16"
    with tempfile.TemporaryDirectory() as folder:
        case = objective, kind, is_lora, precision, device, settings, Path(folder)
        make_trainer(*case, rows=ROWS, callbacks=callbacks).train()
    events = profiled.events() if device == "cuda" else None
    result = {}
    for window, counted in counting.items():
        result[window] = {"waits": sum(counted.lines.values()), "lines": dict(counted.lines)}
        if events is not None:
            result[window]["profiler"] = profiled_counts(events, window)
    return result


def cases(args: argparse.Namespace) -> list[dict]:
    """All cases, in the order of their worth."""
    ways = ([], ["precompute"], ["precompute", "precompute_ref_preds"])
    if args.tiny:
        return [
            {"objective": "iapo", "kind": "sd", "is_lora": False, "precomputed": ways[1]},
            {"objective": "cpo", "kind": "sd", "is_lora": True, "precomputed": ways[0]},
        ]
    of_papers = [
        {"objective": objective, "kind": kind, "is_lora": is_lora, "precomputed": precomputed}
        for kind in ("sdxl", "sd3", "flux")
        for is_lora in (True, False)
        for objective in PAPERS
        for precomputed in ways
        if (is_lora or objective != "cpo") and not (objective == "sft" and "precompute_ref_preds" in precomputed)
    ]
    others = [
        {"objective": objective, "kind": kind, "is_lora": True, "precomputed": ways[0]}
        for objective in OTHERS
        for kind in ("sdxl", "sd3")
    ]
    first = [case for case in of_papers if case["kind"] == "sdxl"]
    return [*first, *others, *(case for case in of_papers if case not in first)]


def figures(rows: list[dict]) -> list[dict]:
    found, counted = [], [row for row in rows if "error" not in row]
    for objective in OBJECTIVES:
        for kind, having in (("live", False), ("precomputed", True)):
            of_kind = [r for r in counted if r["objective"] == objective and bool(r["precomputed"]) == having]
            if of_kind:
                windows = [row[WINDOWS[0]] for row in of_kind]
                waits = max(window["waits"] for window in windows)
                blocking = max(sum(window.get("profiler", {}).values()) for window in windows)
                found.append(
                    figure(
                        f"{objective}, {kind}: waits in {MICRO_BATCHES} micro-batches; waits and blocking copies by the profiler",
                        f"{waits}; {blocking if 'profiler' in windows[0] else 'not on the CPU'}",
                        "0; 0",
                        waits == blocking == 0,
                    )
                )
    if counted:
        waits = [row[WINDOWS[1]]["waits"] for row in counted]
        found.append(figure("waits in an optimizer step, least and most", f"{min(waits)}, {max(waits)}"))
    return found


def main() -> None:
    args = stage_args(__doc__)
    record = Record(args, figures)
    for case in cases(args):
        record.run(case, lambda case=case: count(**case, device=args.device))
        release(args.device)


if __name__ == "__main__":
    main()
