# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
The same training ends on the same weights and logs, through the command line: however its rows are cut into batches and processes,
wherever it is resumed, and whatever else should not matter. One training of each trainer and kind of model is the reference; each test
changes one thing. An epoch has 11 rows, in steps of 4, 4 and 3; a run has 5 steps.
"""

import pytest

from .trainings import KINDS, TRAINERS, Run, Trainings, difference


TOLERANCE = 1e-6
CUT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
CUT_IN_TWO = {"processes": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
EACH = {"save_steps": 1}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


def moved(run: Run) -> float:
    """The largest weight of what a LoRA starts at zero."""
    return max(
        value.abs().max().item() for name, value in run.weights.items() if "lora_B" in name or "lora.up" in name
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_and_smaller_batches_are_one_and_can_be_resumed_by_one(trainings, trainer):
    """4 rows at once in one process are 1 x 2 in each of two; its checkpoint in mid-epoch leads one process to the same end."""
    one = trainings.reference(trainer, "sd")
    two = trainings.run(trainer, "sd", f"{trainer}-two", save_steps=2, **CUT_IN_TWO)
    assert moved(one) > 1e-3
    assert difference(one, two) <= TOLERANCE
    resumed = trainings.run(trainer, "sd", f"{trainer}-resumed", resume_from_checkpoint=two.folder / "checkpoint-2")
    assert "ends on other weights" not in resumed.stderr
    assert difference(one, resumed) <= TOLERANCE


# ----- batches, processes, epochs -----


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_kind_of_model_is_cut(trainings, trainer, kind):
    """The law above, of each kind of model."""
    two = trainings.run(trainer, kind, f"{trainer}-{kind}-two", **CUT_IN_TWO)
    assert moved(two) > 1e-3
    assert difference(trainings.reference(trainer, kind), two) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_cuts(trainings, trainer):
    """4 x 1 = 1 x 4 = 2 x 2, in one process."""
    one = trainings.reference(trainer, "sd")
    for name, cut in {"1x4": CUT, "2x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}}.items():
        assert difference(one, trainings.run(trainer, "sd", f"{trainer}-{name}", **cut)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_all_weights(trainings, kind):
    """Without a LoRA: two processes are one, and a run resumed across the end of an epoch is the undisturbed one, exactly."""
    flags = {"use_peft": None, "lora_r": None, "learning_rate": 0.01}
    one = trainings.run("instance_dpo", kind, f"all-{kind}", save_steps=2, **flags)
    two = trainings.run("instance_dpo", kind, f"all-{kind}-two", **flags, **CUT_IN_TWO)
    assert difference(one, two) <= TOLERANCE
    flags["resume_from_checkpoint"] = one.folder / "checkpoint-2"
    assert difference(one, trainings.run("instance_dpo", kind, f"all-{kind}-resumed", **flags)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_resuming(trainings, trainer):
    """In mid-epoch and at its end, exactly; on two processes, and by precomputed rows."""
    one = trainings.run(trainer, "sd", f"{trainer}-each", **EACH)
    assert difference(trainings.reference(trainer, "sd"), one) == 0
    for step, flags, most in (
        (1, {}, 0),
        (3, {}, 0),
        (4, CUT_IN_TWO, TOLERANCE),
        (2, {"precompute": True, "precompute_dir": trainings.folder / "resumed"}, TOLERANCE),
    ):
        flags = {**flags, "resume_from_checkpoint": one.folder / f"checkpoint-{step}"}
        resumed = trainings.run(trainer, "sd", f"{trainer}-from-{step}", **flags)
        assert "ends on other weights" not in resumed.stderr
        assert difference(one, resumed) <= most


# ----- what should not matter -----

OFTEN = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 2}
SAME = {
    "workers": {"dataloader_num_workers": 2},
    "kept workers": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 4,
    },
    "recomputed activations": {"activation_checkpointing": True},
    "evaluations": OFTEN,
    "samples": {"sample_prompts": ["a cat"], "sample_steps": 2, "num_inference_steps": 2},
    "hash seed, time zone, locale, folder": {
        "env": {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        "torch_empty_cache_steps": 1,
        "disable_tqdm": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_what_does_not_matter(trainings, tmp_path, name):
    """The weights and the logs of two such runs are the same bits."""
    other = trainings.run("instance_dpo", "sd", f"same-{name}", cwd=tmp_path, **SAME[name])
    assert difference(trainings.reference("instance_dpo", "sd"), other) == 0


@pytest.mark.slow
def test_logging_does_not_matter(trainings):
    """A log of two steps has their mean, weighted by rows; the weights are the same bits."""
    one, other = (
        trainings.reference("instance_dpo", "sd"),
        trainings.run("instance_dpo", "sd", "logged", logging_steps=3),
    )
    rows = {1: 4, 2: 4, 3: 3}
    mean = sum(one.logs[step]["loss"] * number for step, number in rows.items()) / 11
    assert abs(other.logs[3].pop("loss") - mean) <= TOLERANCE
    assert all((one.weights[name] == other.weights[name]).all() for name in one.weights)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_precomputing_and_threads(trainings, trainer):
    """What is encoded beforehand, by one process or two, and the number of threads change nothing beyond rounding."""
    one, flags = trainings.reference(trainer, "sd"), {"precompute": True}
    for name, changed in {
        "precomputed": {**flags, "precompute_dir": trainings.folder / f"one-{trainer}"},
        "precomputed-by-two": {**flags, "precompute_dir": trainings.folder / f"two-{trainer}", **CUT_IN_TWO},
        "threads": {"env": {"OMP_NUM_THREADS": "2"}},
    }.items():
        assert difference(one, trainings.run(trainer, "sd", f"{trainer}-{name}", **changed)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["instance_dpo", "diffusion_kto"])
def test_streams_and_files(trainings, trainer):
    """A stream, of one file or of several, has its rows in order, as a dataset that is not shuffled."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(trainings.dataset(trainer) / "train.parquet"), split="train")
    folder = trainings.folder / f"files-{trainer}"
    folder.mkdir()
    for number in range(3):
        part = rows.shard(3, number, contiguous=True)
        part.to_parquet(folder / f"train-{number:05d}-of-00003.parquet")
    one = trainings.run(trainer, "sd", f"{trainer}-in-order", train_sampling_strategy="sequential")
    streams = {"dataset_streaming": True, "dataset_name": folder}
    files = {"train_sampling_strategy": "sequential", "dataset_name": folder}
    for name, flags in {"streamed": streams, "streamed-by-two": streams | CUT_IN_TWO, "files": files}.items():
        assert difference(one, trainings.run(trainer, "sd", f"{trainer}-{name}", **flags)) <= TOLERANCE


# ----- chance -----

CHANCE = {
    "prompts": ({"prompt_dropout": 0.5}, ("instance_dpo", "attribute_sft", "complex_po", "diffusion_kto")),
    "crops": ({"random_flip": True, "center_crop": False}, TRAINERS),
    "attributes": ({"attribute_dropout": 0.5}, ("attribute_sft",)),
    "inversion": (
        {"noise_source": "inversion", "inversion_steps": 2, "inversion_eta": 0.1},
        ("instance_dpo", "complex_po", "ddspo", "diffusion_kto"),
    ),
    "by epoch": (
        {"precompute": True, "precompute_ref_preds": True},
        ("instance_dpo", "complex_po", "ddspo", "diffusion_kto"),
    ),
    "shapes": (
        {"aspect_ratio_buckets": True, "per_device_train_batch_size": 1},
        ("instance_dpo", "diffusion_kto"),
    ),
    "adamw, cosine": (
        {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        ("instance_dpo",),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trainer"), [(name, trainer) for name, (_, trainers) in CHANCE.items() for trainer in trainers]
)
def test_chance_is_the_rows_own(trainings, name, trainer):
    """What is drawn for a row follows from the seed, the step or epoch, and its id: two processes draw what one does."""
    flags, where = dict(CHANCE[name][0]), trainings.folder / f"{name}-{trainer}"
    cut = {} if name == "shapes" else CUT_IN_TWO
    if (
        name == "shapes"
    ):  # a batch has one shape, and its rows are the same; two micro-batches are those of two processes
        flags["gradient_accumulation_steps"], cut = 2, {"processes": 2, "gradient_accumulation_steps": 1}
    caches = [{"precompute_dir": where / part} if "precompute" in flags else {} for part in ("one", "two")]
    one = trainings.run(trainer, "sd", f"{name}-{trainer}-one", **flags, **caches[0])
    two = trainings.run(trainer, "sd", f"{name}-{trainer}-two", **flags | cut | caches[1])
    assert difference(one, trainings.reference(trainer, "sd")) > 1e-4
    assert difference(one, two) <= TOLERANCE
    if name == "inversion":
        cached = trainings.run(
            trainer, "sd", f"{name}-{trainer}-cached", **flags, precompute=True, precompute_dir=where
        )
        assert difference(one, cached) <= TOLERANCE


@pytest.mark.slow
def test_dropout_is_the_batchs(trainings):
    """A LoRA's dropout is drawn by PyTorch: the same in two runs and when resumed, and what changes it is said when resuming."""
    flags = {"lora_dropout": 0.3}
    one = trainings.run("instance_dpo", "sd", "dropout", **flags, **EACH)
    resume = {**flags, "resume_from_checkpoint": one.folder / "checkpoint-2"}
    assert difference(one, trainings.run("instance_dpo", "sd", "dropout-resumed", **resume)) == 0
    smaller = trainings.run("instance_dpo", "sd", "dropout-smaller", **resume, **CUT)
    assert "rows per batch (`per_device_train_batch_size`) were 4 and are 1" in smaller.stderr
    two = trainings.run("instance_dpo", "sd", "dropout-two", **flags, **CUT_IN_TWO, save_steps=2)
    one = trainings.run(
        "instance_dpo", "sd", "dropout-one", **flags, **CUT, resume_from_checkpoint=two.folder / "checkpoint-2"
    )
    assert "processes (of which each draws its own dropout) were 2 and are 1" in one.stderr
    assert difference(two, one) > TOLERANCE
