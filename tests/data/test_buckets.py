# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import itertools
import logging
import math
from collections import Counter

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from tests import tiny
from tests.tiny import FAST, losses, max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    attribute_features,
    instance_pair_features,
)
from trl_diffusion.data.buckets import BucketSampler, bucket_sizes, nearest_bucket
from trl_diffusion.data.collators import InstancePairCollator


SHAPES = [(40, 24), (64, 64), (24, 40), (20, 33), (33, 20), (32, 48), (200, 30), (30, 200), (9, 8)]
SETTINGS = {
    "resolution": 32,
    "aspect_ratio_buckets": True,
    **FAST,
    "max_steps": 6,
}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    return buffer.getvalue()


def turned(width: int, height: int, orientation: int = 6) -> Image.Image:
    """An image whose EXIF orientation says that it lies on its side."""
    image = tiny.image(0, width, height)
    image.getexif()[0x0112] = orientation
    return image


def painted(width: int, height: int, box: list[int]) -> Image.Image:
    """A white rectangle on black."""
    image = Image.new("RGB", (width, height))
    image.paste("white", tuple(box))
    return image


def pairs_of(shapes: list[tuple[int, int]]) -> Dataset:
    """Pairs whose images are (width, height) of the shapes, with a conflict in the middle of each."""
    rows = [
        {
            "id": f"row-{index}",
            "prompt": ["a cat", "a dog", "a circle"][index % 3],
            "chosen": tiny.image(2 * index, width, height),
            "rejected": tiny.image(2 * index + 1, width, height),
            "instances": [
                {
                    "label": "cat",
                    "chosen_box": [width // 4, height // 4, 3 * width // 4, 3 * height // 4],
                    "rejected_box": [0, 0, width // 2, height // 2],
                    "preference": "rejected",
                }
            ],
        }
        for index, (width, height) in enumerate(shapes)
    ]
    return Dataset.from_list(rows, features=instance_pair_features())


def paintings_of(shapes: list[tuple[int, int]]) -> Dataset:
    rows = [
        {
            "id": f"row-{index}",
            "prompt": "a",
            "image": tiny.image(index, width, height),
            "positive_attributes": ["hue"],
            "negative_attributes": ["kind"],
        }
        for index, (width, height) in enumerate(shapes)
    ]
    return Dataset.from_list(rows, features=attribute_features())


def make_trainer(folder, pipeline=None, dataset=None, peft_config=None, **kwargs) -> InstanceDPOTrainer:
    given = {name: kwargs.pop(name) for name in ("eval_dataset", "data_collator") if name in kwargs}
    return InstanceDPOTrainer(
        pipeline or tiny.sd_pipeline(),
        args=InstanceDPOConfig(str(folder), **{**SETTINGS, **kwargs}),
        train_dataset=pairs_of(SHAPES * 3) if dataset is None else dataset,
        peft_config=peft_config,
        **given,
    )


def watch(trainer, monkeypatch) -> list:
    """(ids, latent grid) of each batch whose loss is computed."""
    seen, compute_loss, sample_latents = [], trainer.compute_loss, trainer.encoder.sample_latents

    def noted_latents(inputs, keys):
        latents = sample_latents(inputs, keys)
        seen[-1].append(tuple(latents.shape[2:]))
        return latents

    def noted_loss(model, inputs, *args, **kwargs):
        seen.append([list(inputs["id"])])
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", noted_loss)
    monkeypatch.setattr(trainer.encoder, "sample_latents", noted_latents)
    return seen


# ---- The sizes ----


@pytest.mark.parametrize(
    ("resolution", "multiple"),
    [(32, 8), (36, 8), (44, 8), (128, 8), (512, 64), (520, 64), (768, 64), (1024, 32), (1000, 32)],
)
def test_sizes_are_multiples_of_about_the_pixels_of_the_square(resolution, multiple):
    """Sides are multiples, no size has more pixels than the square, and none misses more than its rounding."""
    sizes = bucket_sizes(resolution, multiple)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert (height + multiple) * (width + multiple) > resolution**2
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(("resolution", "multiple"), [(32, 8), (512, 64), (1024, 32), (1024, 64), (768, 64)])
def test_sizes_lie_between_1_to_2_and_2_to_1_and_turn_into_one_another(resolution, multiple):
    """Each size is there upright and lying, the square among them, and they go from high to low."""
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert sizes == sorted(sizes, reverse=True)
    shapes = [height / width for height, width in sizes]
    assert 0.5 <= min(shapes) < 0.75 and 1.3 < max(shapes) <= 2


def test_sizes_of_sdxl_by_hand():
    """At 1024 in steps of 64, as in SDXL's own list as far as 1:2: 1024 x 1024, 1088 x 960, ... 1408 x 704 (h, w)."""
    wide = [size for size in bucket_sizes(1024, 64) if size[0] <= size[1]]
    expected = [
        (704, 1408),
        (768, 1344),
        (768, 1280),
        (832, 1216),
        (896, 1152),
        (896, 1088),
        (960, 1088),
        (1024, 1024),
    ]
    assert set(wide) >= {(704, 1408), (768, 1344), (832, 1216), (1024, 1024)}
    assert set(wide) <= {*expected, (832, 1152), (960, 1024)}


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (100, 100), (101, 100), (7, 5), (320, 512), (3, 4)])
def test_the_nearest_bucket_has_the_nearest_ratio(shape):
    """No other size's ratio is nearer to the image's, as a factor."""
    buckets = bucket_sizes(512, 64)
    chosen = nearest_bucket([shape], buckets)
    distances = {bucket: abs(math.log(shape[0] * bucket[1] / (shape[1] * bucket[0]))) for bucket in buckets}
    assert distances[chosen] == min(distances.values())
    assert nearest_bucket([shape[::-1]], buckets) == chosen[::-1]


def test_a_pair_of_two_shapes_meets_in_the_middle():
    """1:2 and 2:1 share the square; the order of the pair does not matter."""
    buckets = bucket_sizes(512, 64)
    assert nearest_bucket([(100, 200), (200, 100)], buckets) == (512, 512)
    assert nearest_bucket([(100, 200), (100, 100)], buckets) == nearest_bucket([(100, 100), (100, 200)], buckets)
    assert nearest_bucket([(100, 200), (100, 100)], buckets) == nearest_bucket([(100, 141)], buckets) != (512, 512)
    assert nearest_bucket([(100, 141)], buckets) != nearest_bucket([(100, 200)], buckets)


@pytest.mark.parametrize("stored", ["image", "bytes", "undecoded"])
def test_a_turned_image_is_sorted_by_its_upright_shape(stored):
    """Stored as landscape and shown as portrait: the bucket is a high one, and the picture fills it."""
    image = turned(40, 24)
    value = {"image": image, "bytes": png(image), "undecoded": {"bytes": png(image), "path": None}}[stored]
    collator = InstancePairCollator(32, buckets=bucket_sizes(32, 8))
    row = {"id": "0", "prompt": "a cat", "chosen": value, "rejected": value}
    assert collator.size(row) == (40, 24)
    batch = collator([row])
    assert batch["chosen_pixel_values"].shape == (1, 3, 40, 24)
    assert batch["chosen_original_sizes"].tolist() == [[40, 24]]
    assert batch["chosen_crop_top_lefts"].tolist() == [[0, 0]]


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_an_image_that_is_mirrored_or_upside_down_keeps_its_shape(orientation):
    """Only the orientations 5 to 8 swap height and width."""
    image = turned(40, 24, orientation)
    collator = InstancePairCollator(32, buckets=bucket_sizes(32, 8))
    assert collator.size({"id": "0", "chosen": image, "rejected": image}) == (24, 40)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", [(200, 128), (130, 300), (128, 128), (90, 64), (300, 100)])
def test_boxes_follow_the_crop_to_a_bucket(size, random):
    """In a bucket that is not square, the box still encloses the rectangle that it enclosed."""
    width, height = size
    box = [width // 4, height // 3, 3 * width // 4, 2 * height // 3]
    image = painted(width, height, box)
    instance = {"label": "x", "chosen_box": box, "rejected_box": box, "preference": "rejected"}
    row = {"prompt": "a cat", "chosen": image, "rejected": image, "instances": [instance]}
    collator = InstancePairCollator(128, not random, random, buckets=bucket_sizes(128, 8))
    for row_id in range(4):
        batch = collator([{"id": row_id, **row}])
        for column in ("chosen", "rejected"):
            pixels = batch[f"{column}_pixel_values"][0]
            rows, columns = (pixels >= 128).all(dim=0).nonzero().unbind(dim=1)
            paint = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
            scale = torch.tensor([pixels.shape[2], pixels.shape[1]] * 2)
            difference = (batch[f"{column}_boxes"][0, 0] * scale - torch.tensor(paint)).abs().max().item()
            assert difference <= 1.5, (size, column, difference)
    assert (pixels.shape[1] > pixels.shape[2]) == (height > width)


# ---- The sampler ----


BUCKETS = [(40, 24)] * 7 + [(32, 32)] * 5 + [(24, 40)] * 2 + [(16, 48)]


def test_every_run_of_a_batch_is_of_one_bucket_and_no_row_comes_twice():
    """In every epoch; as many rows as the length says."""
    for epoch in range(5):
        sampler = BucketSampler([list(bucket) for bucket in BUCKETS], 2, 0, lambda epoch=epoch: epoch)
        rows = list(sampler)
        assert len(rows) == len(set(rows)) == len(sampler) == 6 + 4 + 2
        assert all(len({BUCKETS[row] for row in rows[start : start + 2]}) == 1 for start in range(0, len(rows), 2))


def test_rows_left_out_are_others_in_other_epochs():
    """Over many epochs every row of a bucket with a full batch takes part, about equally often."""
    epochs, counts = itertools.count(), Counter()
    sampler = BucketSampler(BUCKETS, 2, 0, lambda: next(epochs))
    for _ in range(200):
        counts.update(sampler)
    assert set(counts) == set(range(14))  # the last row's bucket has no full batch
    assert all(abs(counts[row] - 200 * 6 / 7) < 40 for row in range(7))
    assert all(abs(counts[row] - 200 * 4 / 5) < 40 for row in range(7, 12))


def test_the_order_follows_from_seed_and_epoch_alone():
    """The same ones give the same order whatever was drawn before; another seed or epoch gives another."""

    def order(seed, epoch, buckets=BUCKETS):
        torch.manual_seed(epoch)
        return list(BucketSampler(buckets, 2, seed, lambda: epoch))

    again = BucketSampler(BUCKETS, 2, 3, lambda: 0)
    list(again)
    assert order(3, 0) == order(3, 0) == list(again)
    orders = [order(seed, epoch) for seed in (0, 100) for epoch in range(3)]
    assert len({tuple(rows) for rows in orders}) == 6
    state = torch.get_rng_state()
    list(again)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_buckets_are_mixed():
    """Buckets do not come one after the other."""
    sampler = BucketSampler([(1, 1)] * 40 + [(1, 2)] * 40, 2, 0, lambda: 0)
    firsts = [BUCKET for BUCKET, _ in itertools.groupby(row < 40 for row in list(sampler)[::2])]
    assert len(firsts) > 8


def loader(process_index: int, num_processes: int, epoch: int):
    sampler = BucketSampler(BUCKETS * 2, 2, 0, lambda: epoch)
    plain = torch.utils.data.DataLoader(range(len(BUCKETS) * 2), batch_size=2, sampler=sampler)
    return prepare_data_loader(
        plain, num_processes=num_processes, process_index=process_index, dispatch_batches=False, put_on_device=False
    )


def test_two_processes_share_the_batches_of_each_epoch():
    """Together they see what one sees, in the same steps, and each batch is of one bucket."""
    for epoch in range(3):
        shards = []
        for index, count in ((0, 2), (1, 2), (0, 1)):
            shards.append([batch.tolist() for batch in loader(index, count, epoch)])
        first, second, alone = shards
        for rows in first + second:
            assert len(rows) == 2 and len({(BUCKETS * 2)[row] for row in rows}) == 1
        interleaved = [rows for both in zip(first, second, strict=True) for rows in both]
        assert interleaved[: len(alone)] == alone


@pytest.mark.parametrize("num_processes", [1, 2])
def test_skipped_batches_are_those_of_the_epoch(num_processes):
    """A run that resumes within its second epoch goes on in that epoch's order, in every process."""
    for index in range(num_processes):
        expected = [batch.tolist() for batch in loader(index, num_processes, 1)]
        rest = skip_first_batches(loader(index, num_processes, 1), 2)
        assert [batch.tolist() for batch in rest] == expected[2:]


# ---- Training ----


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pairs_of_many_shapes_train_in_their_buckets(tmp_path, monkeypatch, family, precompute):
    """Each batch is of one size, each image at the size nearest to it, and epochs differ in their order."""
    pipeline = {"sd": tiny.sd_pipeline, "sdxl": tiny.sdxl_pipeline}[family]()
    settings = {"precompute": precompute, "precompute_dir": str(tmp_path / "cache")}
    dataset = pairs_of(SHAPES * 2)
    trainer = make_trainer(tmp_path, pipeline, dataset, max_steps=-1, num_train_epochs=2, **settings)
    seen = watch(trainer, monkeypatch)
    asked, predict = [], trainer.backbone.predict

    def noted(model, latents, timesteps, conditions):
        asked.append((tuple(latents.shape[2:]), conditions.get("time_ids")))
        return predict(model, latents, timesteps, conditions)

    monkeypatch.setattr(trainer.backbone, "predict", noted)
    trainer.train()
    buckets = bucket_sizes(32, 8)
    size = {f"row-{index}": nearest_bucket([shape[::-1]], buckets) for index, shape in enumerate(SHAPES * 2)}
    assert len({grid for _, grid in seen}) == 3
    for ids, (height, width) in seen:
        assert [size[row_id] for row_id in ids] == [(4 * height, 4 * width)] * 2
    half = len(seen) // 2
    epochs = [[row_id for ids, _ in part for row_id in ids] for part in (seen[:half], seen[half:])]
    assert len(epochs[0]) == len(set(epochs[0])) == len(epochs[1]) == len(set(epochs[1])) == 18
    assert epochs[0] != epochs[1]
    for (height, width), time_ids in asked:
        if family == "sdxl":
            assert time_ids.tolist() == [[4 * height, 4 * width, 0, 0, 4 * height, 4 * width]] * 4
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_a_mask_covers_the_box_on_a_grid_that_is_not_square(tmp_path):
    """A conflict in the left half of a wide image takes the left half of the wide latent grid out."""
    box = [0, 0, 20, 24]
    instance = {"label": "x", "chosen_box": box, "rejected_box": [0, 0, 40, 12], "preference": "rejected"}
    trainer = make_trainer(tmp_path)
    row = pairs_of([(40, 24)])[0] | {"id": "0", "instances": [instance]}
    batch = trainer.data_collator([row])
    latents = tiny.latents(trainer, batch)
    assert latents.shape == (2, 4, 6, 10)
    chosen, rejected = trainer.prepare_batch(batch, latents)["masks"]
    assert chosen[:, :5].eq(0).all() and chosen[:, 5:].gt(0).all()
    assert rejected[:3].eq(0).all() and rejected[3:].gt(0).all()


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_paintings_of_many_shapes_train_in_their_buckets(tmp_path, monkeypatch, precompute):
    """Both stages of CPO train on every size."""
    (tmp_path / "tiny.yaml").write_text(tiny.CRITERIA)
    settings = SETTINGS | {"criteria": str(tmp_path / "tiny.yaml"), "precompute": precompute}
    settings |= {"precompute_dir": str(tmp_path / "cache")}
    lora = LoraConfig(r=4, lora_alpha=4)
    dataset = paintings_of(SHAPES * 2)
    args = AttributeSFTConfig(str(tmp_path / "expert"), **settings)
    expert = AttributeSFTTrainer(tiny.sd_pipeline(), args, train_dataset=dataset, peft_config=lora)
    expert.train()
    expert.save_model()
    args = ComplexPOConfig(str(tmp_path / "policy"), **settings)
    policy = ComplexPOTrainer(
        tiny.sd_pipeline(), str(tmp_path / "expert"), args, train_dataset=dataset, peft_config=lora
    )
    seen = watch(policy, monkeypatch)
    policy.train()
    assert len({grid for _, grid in seen}) > 1 and len(seen) == 6
    assert all(math.isfinite(loss) for trainer in (expert, policy) for loss in losses(trainer))


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_evaluation_takes_every_row_once_whatever_its_batch_size(tmp_path, monkeypatch, precompute):
    """Also a row whose size no other has."""
    settings = {"precompute": precompute, "precompute_dir": str(tmp_path / "cache")}
    metrics = []
    for batch_size in (1, 4):
        trainer = make_trainer(
            tmp_path, per_device_eval_batch_size=batch_size, eval_dataset=pairs_of(SHAPES[:5]), **settings
        )
        seen = watch(trainer, monkeypatch)
        with torch.no_grad():
            trainer.model.conv_out.bias.add_(0.1)
        metrics.append(trainer.evaluate())
        assert sorted(row_id for ids, _ in seen for row_id in ids) == [f"row-{index}" for index in range(5)]
    for name in ("eval_loss", "eval_errors/chosen", "eval_rewards/margins"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-6)


def test_evaluation_in_buckets_equals_each_row_alone(tmp_path):
    """The mean of the rows' own evaluations."""
    whole = make_trainer(tmp_path, eval_dataset=pairs_of(SHAPES[:3])).evaluate()["eval_errors/chosen"]
    dataset = pairs_of(SHAPES[:3])
    alone = [
        make_trainer(tmp_path, eval_dataset=dataset.select([row])).evaluate()["eval_errors/chosen"] for row in range(3)
    ]
    assert whole == pytest.approx(sum(alone) / 3, abs=1e-6)


def test_two_batches_of_two_sizes_are_accumulated_as_their_mean(tmp_path, monkeypatch):
    """Batches of 2 and 2 accumulations: what a step logs is the mean of both, of whatever sizes."""
    dataset = pairs_of(SHAPES[:3] * 6)
    settings = {"dataset": dataset, "max_steps": 4, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, **settings)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert len(seen) == 8 and len({row_id for ids, _ in seen for row_id in ids}) == 16
    assert any(first[1] != second[1] for first, second in zip(seen[::2], seen[1::2], strict=True))
    trainer.model.train()
    trainer.state.global_step = 3
    rows = {row["id"]: row for row in dataset}
    errors = []
    for ids, _ in seen[6:]:
        trainer.compute_loss(trainer.model, trainer.data_collator([rows[row_id] for row_id in ids]))
        errors.append(trainer.meters.averages("train")["errors/chosen"])
    logged = [entry["errors/chosen"] for entry in trainer.state.log_history if "errors/chosen" in entry]
    assert logged[3] == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_a_run_resumed_in_its_second_epoch_is_the_uninterrupted_one(tmp_path):
    """The rows that are left are those of that epoch's order: the same weights, bit for bit."""
    dataset = pairs_of(SHAPES[:3] * 3)  # 3 batches an epoch
    whole = make_trainer(tmp_path / "whole", dataset=dataset, max_steps=6)
    whole.train()
    make_trainer(tmp_path / "cut", dataset=dataset, max_steps=6, save_strategy="steps", save_steps=4).train()
    resumed = make_trainer(tmp_path / "cut", dataset=dataset, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert losses(resumed)[4:] == losses(whole)[4:]
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0


def test_rows_that_fill_no_batch_are_counted(tmp_path, caplog):
    """The warning says how many of how many rows an epoch leaves out; where none is, there is no warning."""
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, dataset=pairs_of([(32, 32)] * 5 + [(40, 24)] * 3 + [(24, 40)])).train()
    assert "3 of 9 rows are left out of each epoch" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, dataset=pairs_of([(32, 32)] * 4 + [(40, 24)] * 2)).train()
    assert "left out" not in caplog.text


# ---- Mistakes ----


def test_a_stream_has_no_buckets(tmp_path):
    """The error names the setting and what to do."""
    with pytest.raises(ValueError, match="`train_dataset` is a stream.*without `aspect_ratio_buckets`"):
        make_trainer(tmp_path, dataset=pairs_of(SHAPES).to_iterable_dataset())


def test_buckets_without_a_full_batch_are_an_error(tmp_path):
    """Rows of as many sizes as there are rows fill no batch of 2."""
    with pytest.raises(ValueError, match="No size has the 2 rows of a batch. Lower `per_device_train_batch_size`"):
        make_trainer(tmp_path, dataset=pairs_of([(32, 32), (40, 24), (24, 40)])).train()


def test_an_own_collator_without_sizes_is_an_error_that_says_so(tmp_path):
    """Rows cannot be sorted by the sizes of a collator that has none."""
    collator = InstancePairCollator(32)
    with pytest.raises(ValueError, match="data_collator"):
        make_trainer(tmp_path, data_collator=lambda rows: collator(rows)).train()


def test_an_unreadable_image_is_named(tmp_path):
    """Reading the sizes names the row whose header is broken."""
    dataset = pairs_of([(32, 32)] * 4).remove_columns("chosen")
    broken = [{"bytes": b"no image", "path": None}] * 4
    with pytest.raises(ValueError, match="`chosen` of the row with id 'row-0' cannot be read"):
        make_trainer(tmp_path, dataset=dataset.add_column("chosen", broken)).train()
