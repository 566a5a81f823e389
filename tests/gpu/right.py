# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Is a training on a GPU the training on the CPU? Tiny real models, three steps, every trainer and family.

The losses of three steps in float32 on the CPU are what each case is compared to. float32 differs by the order of sums: 1e-4.
In half precision each layer rounds its activations, by up to 2^-9 of their size in bfloat16 and 2^-12 in float16. Twenty layers
in a row make 1 % of a prediction, in an image of 256 numbers 0.1 % of its mean squared error; the objectives multiply the
difference of two such errors by beta / 2, here 50. So bfloat16 may differ by 0.05, float16, with three bits more, by 0.05 / 8;
the losses of SFT and MaPO hold an error itself, and may differ by 0.05 of their size. Where float16's scaler skips a step, the
losses after it are those of other weights, and are not compared.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from tests import tiny
from tests.benchmark.arms import release
from tests.gpu.record import Record, figure, stage_args
from tests.methods import METHODS


TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05 / 8}
PRECISIONS = tuple(TOLERANCE)
FAMILIES = ("sd", "sdxl", "sd3", "flux")
OTHER_FAMILIES = tuple(kind for kind in tiny.PIPELINES if kind not in FAMILIES)
OBJECTIVES = {
    "iapo": {"learning_rate": 1e-4, "beta": 100.0, "w_neg": -0.5},
    "sft": {"learning_rate": 1e-3},
    "cpo": {"learning_rate": 1e-3, "beta": 50.0},
    "kto": {"learning_rate": 1e-4, "beta": 100.0},
    "ddspo": {"learning_rate": 1e-3, "beta": 50.0},
    "safe": {"learning_rate": 1e-4, "beta": 100.0},
    "mapo": {"learning_rate": 1e-4},
}
PAPERS = ("iapo", "sft", "cpo")
OTHERS = tuple(name for name in OBJECTIVES if name not in PAPERS)
# Where the policy is the reference
FIRST_LOSS = {"iapo": math.log(2), "cpo": math.log(2), "ddspo": math.log(2), "safe": math.log(2), "kto": 0.5}
VARIANTS = {
    "precomputed": {"precompute": True},
    "reference_precomputed": {"precompute": True, "precompute_ref_preds": True},
    "inversion": {"noise_source": "inversion", "inversion_steps": 4},
}
SAMPLING = {"num_inference_steps": 2}
FOLDER = Path(tempfile.mkdtemp())


class SkippedSteps(TrainerCallback):
    """Notes whether the scaler skipped each step."""

    def __init__(self):
        self.skipped: list[bool] = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.skipped.append(bool(optimizer.step_was_skipped))


@cache
def expert(kind: str) -> str:
    """The folder of an expert of a family for CPO, trained on the CPU."""
    folder = FOLDER / f"expert-{kind}"
    trainer = make_trainer("sft", kind, True, "fp32", "cpu", {"learning_rate": 0.05}, folder)
    trainer.train()
    trainer.save_model(str(folder))
    release("cpu")  # the state of `accelerate`, of which a process has one, is not to be that of the CPU
    return str(folder)


def make_trainer(
    objective: str,
    kind: str,
    is_lora: bool,
    precision: str,
    device: str,
    settings: dict,
    folder: Path,
    rows: int = 8,
    callbacks: list[TrainerCallback] | None = None,
):
    """A trainer of three steps."""
    pipeline, method = tiny.PIPELINES[kind](), METHODS[objective]
    common = tiny.FAST | OBJECTIVES[objective] | method.settings | tiny.settings(pipeline)
    common |= {"bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": device == "cpu"}
    common |= {"output_dir": str(folder), "dataloader_num_workers": 0} | settings
    if settings.get("precompute"):
        common["precompute_dir"] = str(folder / "cache")
    if method.reads_attributes:
        criteria = FOLDER / "criteria.yaml"
        criteria.write_text(tiny.CRITERIA)
        common["criteria"] = str(criteria)
    trainer = method.trainer(
        pipeline,
        **({"expert": expert(kind)} if objective == "cpo" else {}),
        args=method.config(**common),
        train_dataset=method.rows(rows),
        peft_config=tiny.lora(alpha=8) if is_lora else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(*case, folder: Path, resume: str | None = None):
    """A trainer after its training, and which of its steps were skipped."""
    noted = SkippedSteps()
    trainer = make_trainer(*case, folder, callbacks=[noted])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, noted.skipped


@cache
def cpu_losses(objective: str, kind: str, is_lora: bool, variant: str | None) -> list[float]:
    """The losses in float32 on the CPU."""
    settings = VARIANTS[variant] if variant else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = train(objective, kind, is_lora, "fp32", "cpu", settings, folder=Path(folder))
        return tiny.losses(trainer)


def is_picture(image) -> bool:
    """Whether an image shows something: numbers that are not finite become one colour."""
    return float(np.asarray(image, dtype=np.float32).std()) > 1


def compare(objective: str, kind: str, is_lora: bool, precision: str, variant: str | None, device: str) -> dict:
    """A training on the device beside the one on the CPU."""
    expected = cpu_losses(objective, kind, is_lora, variant)
    release(device)
    settings = (VARIANTS[variant] if variant else {}) | SAMPLING
    with tempfile.TemporaryDirectory() as folder:
        trainer, skipped = train(objective, kind, is_lora, precision, device, settings, folder=Path(folder))
        losses, images = tiny.losses(trainer), trainer.sample(["a cat"])
    compared = skipped.index(True) + 1 if True in skipped else len(losses)
    scale = max(1, *(abs(loss) for loss in expected)) if objective in ("sft", "mapo") else 1
    difference = max(abs(a - b) for a, b in zip(losses[:compared], expected, strict=False)) / scale
    first = FIRST_LOSS.get(objective)
    return {
        "losses": losses,
        "expected": expected,
        "compared": compared,
        "difference": difference,
        "is_equal": difference <= TOLERANCE[precision],
        "first_loss_is_ln_2": first is None or abs(losses[0] - first) <= TOLERANCE[precision],
        "sample_is_picture": is_picture(images[0]),
    }


def resume(objective: str, kind: str, is_lora: bool, precision: str, device: str) -> dict:
    """A training that was stopped after two steps beside one that was not: losses and weights."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"save_strategy": "steps", "save_steps": 2}
            case = objective, kind, is_lora, precision, device, settings
            whole, _ = train(*case, folder=Path(folder))
            losses, weights = tiny.losses(whole), tiny.weights(whole.policy)
            resumed, _ = train(*case, folder=Path(folder), resume=f"{folder}/checkpoint-2")
            difference = abs(tiny.losses(resumed)[-1] - losses[-1])
            moved = tiny.max_difference(weights, tiny.weights(resumed.policy))
    finally:
        torch.use_deterministic_algorithms(False)
    is_equal = max(difference, moved) <= 1e-6
    return {"losses": losses, "difference": difference, "weights_difference": moved, "is_equal": is_equal}


def compiled(objective: str, kind: str, is_lora: bool, precision: str, device: str) -> dict:
    """A compiled training beside one that is not."""
    both = []
    for more in ({}, {"torch_compile": True}):
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = train(objective, kind, is_lora, precision, device, more, folder=Path(folder))
            both.append(tiny.losses(trainer))
    difference = max(abs(a - b) for a, b in zip(*both, strict=True))
    return {"losses": both[1], "difference": difference, "is_equal": difference <= TOLERANCE[precision]}


def comparisons(objectives, kinds, precisions, variants=(None,), loras=(True, False)) -> Iterator[dict]:
    for precision in precisions:
        for objective in objectives:
            for kind in kinds:
                for variant in variants:
                    for is_lora in loras:
                        if is_lora or objective != "cpo":  # its models are adapters on one base
                            yield {
                                "what": "compare",
                                "objective": objective,
                                "kind": kind,
                                "is_lora": is_lora,
                                "precision": precision,
                                "variant": variant,
                            }


def case(what: str, kind: str, is_lora: bool, precision: str = "fp32") -> dict:
    return {"what": what, "objective": "iapo", "kind": kind, "is_lora": is_lora, "precision": precision}


def cases(args: argparse.Namespace) -> list[dict]:
    """All cases, in the order of their worth."""
    if args.tiny:
        return [
            *comparisons(("iapo",), ("sd",), PRECISIONS, loras=(True,)),
            *comparisons(("cpo",), ("sd3",), ("fp32",)),
            *comparisons(("sft",), ("sd",), ("fp32",), loras=(False,)),
            case("resume", "sd", True),
        ]
    half = PRECISIONS[1:]
    return [
        *comparisons(("iapo",), FAMILIES, PRECISIONS),
        *comparisons(("sft", "cpo"), FAMILIES, ("fp32",)),
        *comparisons(OTHERS, ("sd", "sd3"), ("fp32", "bf16"), loras=(True,)),
        *(case("resume", kind, is_lora) for kind, is_lora in (("sd", True), ("sdxl", False), ("flux", True))),
        *comparisons(("iapo",), FAMILIES, ("fp32",), VARIANTS, loras=(True,)),
        *comparisons(("sft", "cpo"), FAMILIES, half),
        case("compile", "sd", True),
        *comparisons(PAPERS, OTHER_FAMILIES, PRECISIONS),
        *(case("resume", kind, is_lora, "bf16") for kind in FAMILIES for is_lora in (True, False)),
        *comparisons(("cpo", "sft"), FAMILIES, ("fp32",), ("precomputed",), loras=(True,)),
    ]


def figures(rows: list[dict]) -> list[dict]:
    found = []
    for precision, tolerance in TOLERANCE.items():
        compared = [
            row for row in rows if row["what"] == "compare" and row["precision"] == precision and "error" not in row
        ]
        if compared:
            worst, equal = max(row["difference"] for row in compared), sum(row["is_equal"] for row in compared)
            found.append(
                figure(
                    f"{precision}: largest difference of a loss from the CPU's; trainings that are equal",
                    f"{worst:.1e}; {equal} of {len(compared)}",
                    f"<= {tolerance:.2g}; all",
                    equal == len(compared),
                )
            )
    for name, what in (
        ("first_loss_is_ln_2", "first loss is that of the reference: ln 2, or 0.5 of Diffusion-KTO"),
        ("sample_is_picture", "samples are pictures"),
    ):
        having = [row[name] for row in rows if name in row]
        if having:
            found.append(figure(what, f"{sum(having)} of {len(having)}", "all", all(having)))
    for what, name in (("resume", "resumed equals undisturbed"), ("compile", "compiled equals not compiled")):
        having = [row for row in rows if row["what"] == what and "error" not in row]
        if having:
            equal, worst = [row["is_equal"] for row in having], max(row["difference"] for row in having)
            found.append(figure(name, f"{sum(equal)} of {len(equal)}, at most {worst:.1e}", "all", all(equal)))
    return found


def main() -> None:
    args = stage_args(__doc__)
    record = Record(args, figures)
    functions = {"compare": compare, "resume": resume, "compile": compiled}
    for one in cases(args):
        if one["precision"] == "fp16" and args.device == "cpu":
            record.skip(one, "float16 with a scaler needs a GPU")
            continue
        settings = {name: value for name, value in one.items() if name != "what"}
        record.run(one, lambda what=one["what"], settings=settings: functions[what](**settings, device=args.device))
        release(args.device)


if __name__ == "__main__":
    main()
