# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import dataclasses
import json
import logging
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import LoraConfig

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    ComplexPOConfig,
    DDSPOConfig,
    DiffusionKTOConfig,
    InstanceDPOConfig,
    instance_pair_features,
)
from trl_diffusion.data import row_contents
from trl_diffusion.data.column_checks import bad_instances, bad_rows
from trl_diffusion.process import DiscreteProcess, RectifiedFlow
from trl_diffusion.trainer.fingerprints import base_fingerprint, same_base
from trl_diffusion.trainer.run_record import (
    NO_MATTER,
    RUN_RECORD_NAME,
    check_resumed_run,
    compare_loras,
    compare_runs,
    dataset_fingerprint,
    describe_lora,
    describe_run,
    library_versions,
    read_run_record,
    write_run_record,
)


CONFIGS = (InstanceDPOConfig, AttributeSFTConfig, ComplexPOConfig, DDSPOConfig, DiffusionKTOConfig)
TARGETS = ["to_q", "to_k"]

# Every setting that is said when it changes, by hand: a new one must be put here or into `NO_MATTER`
SAID = {
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "tf32", "auto_find_batch_size"),
    *("seed", "data_seed", "full_determinism", "ignore_data_skip", "train_sampling_strategy"),
    *("dataloader_drop_last", "dataloader_in_order"),
    # Of this library
    *("resolution", "center_crop", "random_flip", "prompt_dropout", "aspect_ratio_buckets", "timestep_range"),
    *(
        "beta",
        "w_neg",
        "mask_overlap",
        "box_margin",
        "noise_source",
        "inversion_steps",
        "inversion_model",
        "inversion_eta",
    ),
    *("precompute_dtype",),
    *("precompute_ref_preds", "reverse_preference", "size_conditions", "initial_lora_in_reference"),
    *("max_sequence_length", "embedded_guidance", "timestep_density", "logit_mean", "logit_std", "mode_scale"),
    *("attribute_order", "attribute_separator", "max_attributes", "attribute_dropout", "loss_type"),
    *("reflection_weight", "target_strength", "attribute_targets", "timestep_weighting", "policy_condition"),
    *("target_prompts", "dropped_words"),
    *("label_smoothing", "safeguard_mu", "anchor_alpha", "grouped_instances"),
    *("desirable_weight", "undesirable_weight"),
}


def config(kind=InstanceDPOConfig, **settings):
    return kind(**{"output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False} | settings)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": TARGETS} | settings)


PROCESS = DiscreteProcess(torch.linspace(0.99, 0.01, 10), "epsilon").describe()
# Set in the record itself, since they are read from the rows and from the libraries
FOUND = ("dataset", "num_rows", "versions")


def record(args=None, world_size=1, **given) -> dict:
    """A run's record, as it is read back from a checkpoint."""
    args = args or config()
    described = {
        "objective": "InstanceDPOTrainer",
        "base": [0.1, -0.2, 0.3],
        "process": PROCESS,
        "lora": lora(),
    } | {name: value for name, value in given.items() if name not in FOUND}
    with patch.object(type(args), "world_size", property(lambda self: world_size)):
        found = describe_run(args, **described) | {"dataset": "abc", "num_rows": 8}
    return json.loads(json.dumps(found | {name: given[name] for name in FOUND if name in given}))


def another(value):
    """Some other value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"some": 1} if isinstance(value, dict) else [1] if isinstance(value, list) else "another"


class TestSameRun:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_nothing_is_said(self, kind):
        """A run compared with itself has neither errors nor changes."""
        assert compare_runs(record(config(kind)), record(config(kind))) == ([], [])

    def test_nothing_is_said_after_reading(self, tmp_path):
        """Writing and reading a record changes nothing in it."""
        before = record()
        write_run_record(tmp_path, before)
        assert read_run_record(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == [RUN_RECORD_NAME]

    @pytest.mark.parametrize(
        ("batch", "accumulation", "processes"), [(8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4)]
    )
    def test_only_rows_per_step_matter(self, batch, accumulation, processes):
        """Eight rows per step are the same run, however batches, accumulation and processes cut them."""
        args = config(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        assert compare_runs(record(), record(args, world_size=processes)) == ([], [])

    def test_other_rows_per_step_are_said(self):
        """The product is named with its numbers."""
        errors, changes = compare_runs(record(), record(config(gradient_accumulation_steps=2), world_size=3))
        assert errors == []
        assert changes == ["rows per optimizer step (batch size x accumulation x processes) were 8 and are 48"]

    @pytest.mark.parametrize("given", [{"lora": lora(lora_dropout=0.1)}, {"aspect_ratio_buckets": True}])
    def test_batches_matter_with_buckets_and_dropout(self, given):
        """A bucket gives whole batches, and dropout is drawn for a batch: there its size is said too."""
        settings = {k: v for k, v in given.items() if k != "lora"}
        given = {k: v for k, v in given.items() if k == "lora"}
        whole = record(config(**settings), **given)
        cut = record(config(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings), **given)
        assert compare_runs(whole, cut) == (
            [],
            ["rows per batch (`per_device_train_batch_size`) were 8 and are 4"],
        )

    def test_processes_matter_with_dropout(self):
        """Each process draws its own dropout: two that hold the batches of one are another run, and with buckets they are the same."""
        one, two = config(gradient_accumulation_steps=2), config()
        with_dropout = {"lora": lora(lora_dropout=0.1)}
        assert compare_runs(record(one, **with_dropout), record(two, world_size=2, **with_dropout)) == (
            [],
            ["processes (of which each draws its own dropout) were 1 and are 2"],
        )
        one, two = config(gradient_accumulation_steps=2, aspect_ratio_buckets=True), config(aspect_ratio_buckets=True)
        assert compare_runs(record(one), record(two, world_size=2)) == ([], [])


class TestSettings:
    def test_every_setting_is_classified(self):
        """Each field of each configuration is either said or does not matter, and none is both."""
        names = {field.name for kind in CONFIGS for field in dataclasses.fields(kind)}
        assert SAID | NO_MATTER == names
        assert not SAID & NO_MATTER

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_each_setting(self, kind):
        """A setting that is changed alone is said in one line with both values, or not at all where it does not matter."""
        args = config(kind)
        before = record(args)
        for field in dataclasses.fields(kind):
            if field.name in ("per_device_train_batch_size", "gradient_accumulation_steps", "accelerator_config"):
                continue  # compared as rows per step
            now = copy.copy(args)
            value = another(getattr(args, field.name))
            object.__setattr__(now, field.name, value)
            if field.name == "seed":
                object.__setattr__(args, "data_seed", 42)
                object.__setattr__(now, "data_seed", 42)
                before = record(args)
            errors, changes = compare_runs(before, record(now))
            assert errors == [], field.name
            if field.name in NO_MATTER:
                assert changes == [], field.name
            else:
                assert len(changes) == 1, (field.name, changes)
                assert changes[0].startswith(f"`{field.name}` was ") and f" and is {value!r}" in changes[0]

    def test_the_line(self):
        """Both numbers stand in it."""
        changed = compare_runs(record(), record(config(learning_rate=1e-4)))
        assert changed == ([], ["`learning_rate` was 1e-05 and is 0.0001"])

    def test_the_seed_of_the_data_is_the_seed(self):
        """Without `data_seed` the rows' order follows `seed`: written out, it is no change."""
        assert compare_runs(record(config(seed=3)), record(config(seed=3, data_seed=3))) == ([], [])

    @pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
    def test_the_length(self, schedule):
        """More steps are another run where the learning rate falls towards the last one, and only there."""
        before, now = (config(lr_scheduler_type=schedule, max_steps=steps) for steps in (10, 20))
        expected = [] if schedule.startswith("constant") else ["`max_steps` was 10 and is 20"]
        assert compare_runs(record(before), record(now)) == ([], expected)

    def test_the_length_with_a_share_of_warmup(self):
        """A warmup that is a share of the training depends on its length."""
        before, now = (
            config(lr_scheduler_type="constant_with_warmup", warmup_steps=0.1, max_steps=steps) for steps in (10, 20)
        )
        assert compare_runs(record(before), record(now)) == ([], ["`max_steps` was 10 and is 20"])

    def test_epochs_do_not_matter_beside_steps(self):
        """With `max_steps`, `num_train_epochs` has no effect."""
        before, now = (config(max_steps=10, num_train_epochs=epochs) for epochs in (1, 2))
        assert compare_runs(record(before), record(now)) == ([], [])

    def test_what_the_model_resolved(self):
        """A default that is written out is no change; another value is."""
        default = record(config(), resolved={"resolution": 512})
        assert compare_runs(default, record(config(resolution=512), resolved={"resolution": 512})) == ([], [])
        other = record(config(resolution=768), resolved={"resolution": 768})
        assert compare_runs(default, other) == ([], ["`resolution` was 512 and is 768"])

    def test_a_setting_of_another_version(self):
        """One that a version does not have is said where it is set, and only there."""
        before, now = record(), record()
        now["settings"]["of_the_future"] = None
        assert compare_runs(before, now) == ([], [])
        now["settings"]["of_the_future"] = 2
        assert compare_runs(before, now) == ([], ["`of_the_future` was no setting of the older version and is 2"])
        assert compare_runs(now, before) == ([], ["`of_the_future` was 2 and is no setting of this version"])


class TestLora:
    @pytest.mark.parametrize(
        ("setting", "value", "line"),
        [
            ("lora_alpha", 16, "`lora_alpha` was 8 and is 16"),
            ("r", 4, "`r` was 8 and is 4"),
            ("use_rslora", True, "`use_rslora` was False and is True"),
            ("use_dora", True, "`use_dora` was False and is True"),
            ("lora_bias", True, "`lora_bias` was False and is True"),
            ("rank_pattern", {"to_q": 2}, "`rank_pattern` was {} and is {'to_q': 2}"),
            ("alpha_pattern", {"to_q": 2}, "`alpha_pattern` was {} and is {'to_q': 2}"),
            ("target_modules", ["to_q"], "`target_modules` was ['to_k', 'to_q'] and is ['to_q']"),
            ("exclude_modules", ["to_q"], "`exclude_modules` was None and is ['to_q']"),
            ("layers_to_transform", [0], "`layers_to_transform` was None and is [0]"),
        ],
    )
    def test_what_its_weights_mean(self, setting, value, line):
        """Under another strength or other modules the same weights mean something else: an error, with both values."""
        assert compare_runs(record(), record(lora=lora(**{setting: value}))) == ([line], [])

    @pytest.mark.parametrize(("setting", "value"), [("lora_dropout", 0.5), ("init_lora_weights", "gaussian")])
    def test_how_it_is_trained(self, setting, value):
        """Dropout and the first weights do not change what the weights mean: a change."""
        errors, changes = compare_runs(record(), record(lora=lora(**{setting: value})))
        assert errors == [] and len(changes) == 1 and changes[0].startswith(f"`{setting}` was ")

    def test_the_order_of_modules(self):
        """Target modules are a set, also where they were assigned as a list."""
        assert compare_runs(record(), record(lora=lora(target_modules=TARGETS[::-1]))) == ([], [])
        assigned = lora()
        assigned.target_modules = TARGETS
        assert compare_runs(record(), record(lora=assigned)) == ([], [])
        assert compare_runs(record(lora=assigned), record()) == ([], [])

    @pytest.mark.parametrize(("before", "now"), [("all weights", "a LoRA"), ("a LoRA", "all weights")])
    def test_the_other_kind(self, before, now):
        """A LoRA and all weights are different runs."""
        kinds = {"all weights": None, "a LoRA": lora()}
        errors, _ = compare_runs(record(lora=kinds[before]), record(lora=kinds[now]))
        assert errors == [f"the run trained {before} and now trains {now} (`peft_config`)"]

    def test_a_field_that_the_older_peft_did_not_have(self):
        """It was at its default then."""
        before = {name: value for name, value in describe_lora(lora()).items() if name != "megatron_core"}
        assert compare_loras(before, describe_lora(lora())) == ([], [])


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("given", "error"),
        [
            ({"objective": "ComplexPOTrainer"}, "the trainer was InstanceDPOTrainer and is ComplexPOTrainer"),
            *(
                ({"process": other.describe()}, "the noise schedule, or what the model predicts, is another one")
                for other in (
                    DiscreteProcess(torch.linspace(0.99, 0.01, 10), "v_prediction"),
                    DiscreteProcess(torch.linspace(0.98, 0.01, 10), "epsilon"),
                    RectifiedFlow(),
                )
            ),
            ({"base": [0.1, 0.2, 0.3]}, "`model` has other weights"),
            ({"base": [0.1, -0.2]}, "`model` has other weights"),
            ({"criteria": {"hue": ["red", "blue"]}}, "the tree of attributes that `criteria` names is another one"),
            ({"expert": {"a": torch.ones(2)}}, "`expert` is another one"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_errors(self, given, error):
        """Weights mean nothing under another trainer, base, process, expert or tree."""
        assert compare_runs(record(), record(**given)) == ([error], [])

    def test_expert_and_criteria_by_content(self):
        """An expert is its weights, a tree its words."""
        given = {"expert": {"a": torch.ones(2), "b": torch.zeros(1)}, "criteria": {"hue": ["red", "blue"]}}
        before = record(**given)
        assert compare_runs(before, record(**given)) == ([], [])
        moved = given | {"expert": {"a": torch.tensor([1.0, 1.0 + 1e-6]), "b": torch.zeros(1)}}
        assert compare_runs(before, record(**moved))[0] == ["`expert` is another one"]
        reworded = given | {"criteria": {"hue": ["crimson", "blue"]}}
        assert compare_runs(before, record(**reworded))[0] == [
            "the tree of attributes that `criteria` names is another one"
        ]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_base_in_half_precision(self, dtype):
        """The same base in another precision is a change at most, and another base an error."""
        base = base_fingerprint(tiny.sd_pipeline().unet)
        half = base_fingerprint(tiny.sd_pipeline().unet.to(dtype))
        other = base_fingerprint(tiny.sd_pipeline(seed=1).unet)
        assert same_base(base, half) and not same_base(base, other)
        errors, changes = compare_runs(record(base=base), record(base=half))
        assert errors == [] and changes == [
            "`model` has slightly other weights: another precision, or a fine-tuned version"
        ]
        assert compare_runs(record(base=base), record(base=other))[0] == ["`model` has other weights"]

    def test_the_reference(self):
        """Another reference is another run."""
        own, given, other = record(), record(reference=[1.0, 2.0]), record(reference=[1.0, 3.0])
        assert compare_runs(given, given) == ([], [])
        for before, now in [(own, given), (given, own), (given, other)]:
            assert compare_runs(before, now) == ([], ["the reference (`ref_model`) is another one"])

    def test_versions(self):
        """Another version of a library is said, another build of it is not."""
        versions = library_versions()
        assert {"torch", "diffusers", "peft"} < versions.keys()
        assert not any("+" in version for version in versions.values())
        changed = compare_runs(record(versions=versions), record(versions=versions | {"torch": "99"}))
        assert changed == ([], [f"torch was {versions['torch']} and is 99"])


def masks_of(mask) -> list[dict]:
    """One instance, with its mask in the chosen image."""
    boxes = {"chosen_box": None if mask else [0.0, 0.0, 1.0, 1.0], "rejected_box": [0.0, 0.0, 1.0, 1.0]}
    return [{"label": "cat", **boxes, "chosen_mask": mask, "rejected_mask": None, "preference": "chosen"}]


def masked_rows(stored: str, folder: Path, changes: dict[int, int | None]) -> Dataset:
    """200 rows with a mask each; those of some are another one, or none."""
    folder.mkdir(exist_ok=True)
    rows = []
    for row in range(200):
        number = changes.get(row, 0)
        mask = None if number is None else {"bytes": f"mask {row} {number}".encode(), "path": f"{row}.png"}
        if mask and stored == "files":
            path = folder / f"{row}-{number}.png"
            path.write_bytes(mask["bytes"])
            mask = {"bytes": None, "path": str(path)}
        elif stored == "encodings":
            mask = mask and {"size": [4, 4], "counts": f"{row} {number}"}
        rows.append({"id": str(row), "instances": masks_of(mask)})
    fields = instance_pair_features(masks=True)["instances"].feature
    if stored == "encodings":
        rle = {"size": List(Value("int64")), "counts": Value("string")}
        fields = fields | dict.fromkeys(("chosen_mask", "rejected_mask"), rle)
    return Dataset.from_list(rows, features=Features({"id": Value("string"), "instances": List(fields)}))


class TestRows:
    COLUMNS = ("id", "prompt", "chosen", "rejected", "instances", "masks")

    def test_the_same_rows(self):
        """Made twice, a dataset has one fingerprint, and columns that are not trained on do not count."""
        pairs = tiny.pairs(8)
        more = pairs.add_column("note", ["x"] * 8)
        assert (
            dataset_fingerprint(tiny.pairs(8), self.COLUMNS)
            == dataset_fingerprint(pairs, self.COLUMNS)
            == dataset_fingerprint(more, self.COLUMNS)
        )

    def test_in_files(self, tmp_path):
        """Where the rows lie does not matter."""
        tiny.pairs(8).save_to_disk(tmp_path)
        read = Dataset.load_from_disk(tmp_path)
        assert dataset_fingerprint(read, self.COLUMNS) == dataset_fingerprint(tiny.pairs(8), self.COLUMNS)

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows.select(range(7)),
            lambda rows: rows.select(range(7, -1, -1)),
            lambda rows: rows.map(lambda row: {"prompt": row["prompt"] + " dog"}),
            lambda rows: rows.map(lambda row: {"chosen": row["rejected"]}),
            lambda rows: rows.remove_columns("instances"),
        ],
        ids=["fewer", "another order", "other prompts", "other images", "no instances"],
    )
    def test_other_rows(self, change):
        """Rows, their order, texts and images all count."""
        pairs = tiny.pairs(8)
        assert dataset_fingerprint(change(pairs), self.COLUMNS) != dataset_fingerprint(pairs, self.COLUMNS)

    @pytest.mark.parametrize("stored", ["bytes", "files", "encodings"])
    def test_masks_are_read_as_images_are(self, tmp_path, monkeypatch, stored):
        """Of every row counts whether it has masks, of about 64 rows what these are: of 200 rows every third. No other file is opened."""
        read = []
        monkeypatch.setattr(row_contents, "image_content", lambda path: read.append(path) or Path(path).read_bytes())
        before = dataset_fingerprint(masked_rows(stored, tmp_path, {}), self.COLUMNS)
        assert len(read) == len(set(read)) == (67 if stored == "files" else 0)
        for row, is_told in ((0, True), (1, False), (3, True), (198, True), (199, False)):
            other = masked_rows(stored, tmp_path, {row: 1})
            assert (dataset_fingerprint(other, self.COLUMNS) != before) == is_told, row
        for row in (0, 1):
            assert dataset_fingerprint(masked_rows(stored, tmp_path, {row: None}), self.COLUMNS) != before

    def test_masks_in_files(self, tmp_path):
        """Where masks lie does not matter: in bytes, in files of any folder, or on disk, in any order."""
        rows = masked_rows("bytes", tmp_path, {})
        rows.save_to_disk(tmp_path / "saved")
        places = {
            "one folder": masked_rows("files", tmp_path / "a", {}),
            "another": masked_rows("files", tmp_path / "b", {}),
            "on disk": Dataset.load_from_disk(tmp_path / "saved"),
        }
        for order in (range(200), range(199, -1, -1), [5, 5, 7]):
            expected = dataset_fingerprint(rows.select(order), self.COLUMNS)
            for place, data in places.items():
                assert dataset_fingerprint(data.select(order), self.COLUMNS) == expected, place

    @pytest.mark.parametrize("order", [None, "shuffled"])
    def test_masks_are_not_copied(self, tmp_path, order):
        """Of rows on disk with 20 MB of masks, neither their check nor their hash takes a tenth of that from Arrow, nulls or not."""
        rows = [{"instances": masks_of(bytes(100_000)) if row % 7 else None} for row in range(200)]
        features = Features({"instances": List(instance_pair_features(masks=True)["instances"].feature)})
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
        data = Dataset.load_from_disk(tmp_path / "saved")
        data = data if order is None else data.shuffle(seed=0)
        pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            dataset_fingerprint(data.select(range(100)), ("instances",))  # less than 128 rows: of each the masks
            all_rows = pool.max_memory()
            bad_rows(data, "instances", lambda values: bad_instances(values.combine_chunks()))
        finally:
            pa.set_memory_pool(usual)
        assert all_rows < 2_000_000 and pool.max_memory() < 2_000_000

    def test_what_is_said(self):
        """Other rows are a change, their number is named; a stream has none."""
        assert compare_runs(record(), record(dataset="def")) == (
            [],
            ["`train_dataset` has other rows, or the same in another order"],
        )
        assert compare_runs(record(), record(dataset="def", num_rows=9)) == (
            [],
            ["rows of `train_dataset` were 8 and are 9"],
        )
        stream = record(dataset="stream", num_rows="stream")
        assert compare_runs(stream, stream) == ([], [])
        assert compare_runs(record(), stream) == ([], ["rows of `train_dataset` were 8 and are stream"])


class TestFolder:
    def test_nothing_of_the_users_machine(self, tmp_path):
        """No setting with a path, a name or a secret reaches the record."""
        secret = "secret-of-this-machine"
        args = config(
            output_dir=str(tmp_path / secret),
            run_name=secret,
            precompute_dir=f"/{secret}",
            hub_token=secret,
            hub_model_id=secret,
            model_init_kwargs={"cache_dir": f"/{secret}", "token": secret},
            resume_from_checkpoint=f"/{secret}",
            sample_prompts=[secret],
        )
        described = record(args, lora=lora(base_model_name_or_path=f"/{secret}"), versions=library_versions())
        assert secret not in json.dumps(described)
        criteria = record(config(ComplexPOConfig, criteria=f"/{secret}/tree.yaml"))
        assert secret not in json.dumps(criteria)

    def test_resuming(self, tmp_path, caplog):
        """The same run passes in silence, a change is logged, another meaning is an error that names both."""
        write_run_record(tmp_path, record())
        with caplog.at_level(logging.WARNING):
            check_resumed_run(tmp_path, record())
            assert not caplog.records
            check_resumed_run(tmp_path, record(config(beta=5000.0)))
        assert [entry.getMessage() for entry in caplog.records] == [
            f"The run that resumes {tmp_path} is not the run that was stopped, and ends on other weights: "
            "`beta` was 2000.0 and is 5000.0."
        ]
        with pytest.raises(ValueError, match="`lora_alpha` was 8 and is 16") as error:
            check_resumed_run(tmp_path, record(lora=lora(lora_alpha=16)))
        assert str(tmp_path) in str(error.value)

    def test_a_checkpoint_of_an_older_version(self, tmp_path, caplog):
        """Without a record a warning says that nothing can be compared."""
        assert read_run_record(tmp_path) is None
        with caplog.at_level(logging.WARNING):
            check_resumed_run(tmp_path, record())
        assert f"holds no {RUN_RECORD_NAME}" in caplog.text

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_a_record_that_is_broken(self, tmp_path, content):
        """It is a ValueError that names the file."""
        (tmp_path / RUN_RECORD_NAME).write_text(content)
        with pytest.raises(ValueError, match=RUN_RECORD_NAME):
            read_run_record(tmp_path)
