# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import json
import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, List, Value, load_dataset
from PIL import Image as PILImage

from tests import tiny
from trl_diffusion import instance_pair_features
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import PREFERENCES, check_box, check_preference, open_image, prepare_dataset


COLUMNS = ("prompt", "chosen", "rejected")


def prepare(dataset, name: str = "train_dataset"):
    return prepare_dataset(dataset, name, COLUMNS, COLUMNS[1:])


def collate(dataset) -> dict:
    return InstancePairCollator(resolution=16)(list(dataset))


def encoded(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    return buffer.getvalue()


def row(**changes) -> dict:
    return {"prompt": "a cat", "chosen": tiny.image(0), "rejected": tiny.image(1)} | changes


def instance(**changes) -> dict:
    boxes = {"chosen_box": [2, 4, 16, 20], "rejected_box": [4, 2, 20, 16]}
    return {"label": "cat", "preference": "rejected"} | boxes | changes


class TestColumns:
    def test_features(self):
        """The columns are those that the documentation names, with boxes of length 4 and labels in a fixed order."""
        features = instance_pair_features()
        assert list(features) == ["id", "prompt", "chosen", "rejected", "instances"]
        assert features["instances"].feature["chosen_box"] == List(Value("float32"), length=4)
        assert features["instances"].feature["preference"].names == ["chosen", "rejected", "tie"]
        assert isinstance(features["chosen"], Image)

    @pytest.mark.parametrize("missing", COLUMNS)
    def test_missing_column(self, missing):
        """A missing column is a ValueError with its name, those that there are, and the remedy."""
        with pytest.raises(ValueError, match=f"`train_dataset` lacks the column `{missing}`; it has `id`") as error:
            prepare(tiny.pairs(2).remove_columns(missing))
        assert "rename_columns" in str(error.value)

    @pytest.mark.parametrize("stream", [False, True])
    def test_prompts_alone(self, stream):
        """A dataset of prompts lacks two columns, and the message names both and the dataset."""
        dataset = Dataset.from_dict({"prompt": ["a cat"]})
        dataset = dataset.to_iterable_dataset() if stream else dataset
        with pytest.raises(ValueError, match="`eval_dataset` lacks the columns `chosen`, `rejected`; it has `prompt`"):
            prepare(dataset, "eval_dataset")

    def test_stream_of_undeclared_columns(self):
        """A stream without declared columns is judged by its first row."""
        with pytest.raises(ValueError, match="lacks the columns `chosen`, `rejected`; it has `prompt`"):
            prepare(IterableDataset.from_generator(lambda: iter([{"prompt": "a cat"}])))

    @pytest.mark.parametrize("dataset", [DatasetDict({"train": tiny.pairs(1)}), [row()], None])
    def test_not_a_dataset(self, dataset):
        """Anything but a dataset is a ValueError that names its type and says to pass a split."""
        with pytest.raises(ValueError, match=f"`train_dataset` must be .* got `{type(dataset).__name__}`") as error:
            prepare(dataset)
        assert 'dataset["train"]' in str(error.value)

    def test_empty(self):
        """A dataset without rows is refused."""
        with pytest.raises(ValueError, match="`train_dataset` has no rows"):
            prepare(tiny.pairs(2).select([]))

    @pytest.mark.parametrize("names", [["rejected", "chosen", "tie"], ["chosen", "rejected"], ["a", "b", "c"]])
    def test_other_labels(self, names):
        """Labels of other names, or in another order, are refused: their numbers would mean something else."""
        feature = instance_pair_features()["instances"].feature | {"preference": ClassLabel(names=names)}
        rows = [row(instances=[instance(preference=names[0])])]
        features = instance_pair_features() | {"instances": List(feature)}
        del features["id"]
        with pytest.raises(ValueError, match="`instances.preference` of `train_dataset` must be") as error:
            prepare(Dataset.from_list(rows, features=type(instance_pair_features())(features)))
        assert "ClassLabel(names=['chosen', 'rejected', 'tie'])" in str(error.value)

    def test_instances_that_are_no_list(self):
        """One instance instead of a list of them is refused with the column's name and the right type."""
        with pytest.raises(ValueError, match="`instances` of `train_dataset` must be a list") as error:
            prepare(Dataset.from_list([row(instances=instance())]))
        assert "instance_pair_features()" in str(error.value)


class TestAccepted:
    @pytest.mark.parametrize("stream", [False, True])
    def test_class_labels(self, stream):
        """Preferences stored as ClassLabel integers: the rows of the tiny dataset conflict in every other second instance."""
        dataset = tiny.pairs(4)
        assert dataset[1]["instances"][1]["preference"] == 1
        batch = collate(prepare(dataset.to_iterable_dataset() if stream else dataset))
        assert batch["judged"].tolist() == [[True, False], [True, True]] * 2
        assert batch["conflicts"].tolist() == [[False, False], [False, True]] * 2

    def test_names(self):
        """Preferences stored as strings mean the same."""
        dataset = Dataset.from_list([row(instances=[instance(preference=name) for name in PREFERENCES])])
        assert isinstance(dataset.features["instances"].feature["preference"], Value)
        batch = collate(prepare(dataset))
        assert batch["judged"].tolist() == [[True, True, False]]
        assert batch["conflicts"].tolist() == [[False, True, False]]

    def test_no_instances(self):
        """Without the column `instances` there is nothing to judge."""
        batch = collate(prepare(tiny.pairs(2, with_instances=False)))
        assert batch["judged"].shape == (2, 0)
        assert batch["chosen_boxes"].shape == (2, 0, 4)

    def test_empty_list(self):
        """A row whose list of instances is empty, or missing, has none, beside rows that have some."""
        dataset = Dataset.from_list([row(instances=[]), row(instances=[instance()]), row(instances=None)])
        assert collate(prepare(dataset))["judged"].tolist() == [[False], [True], [False]]

    def test_extra_columns_pass_through(self):
        """Columns that the trainer does not know stay in the rows."""
        dataset = prepare(tiny.pairs(2).add_column("ranking_id", [7, 8]))
        assert [row["ranking_id"] for row in dataset] == [7, 8]
        assert collate(dataset)["id"] == ["row-0", "row-1"]

    def test_ids_are_kept(self):
        """Ids of the dataset are left alone, also after a shuffle, and become strings in a batch."""
        dataset = tiny.pairs(4).shuffle(seed=0)
        assert prepare(dataset)["id"] == dataset["id"]
        numbers = tiny.pairs(2).remove_columns("id").add_column("id", [70, 71])
        assert collate(prepare(numbers))["id"] == ["70", "71"]

    def test_missing_ids_are_row_numbers(self):
        """Rows of a dataset without an id get their number as one."""
        prepared = prepare(Dataset.from_list([row(), row(), row()]))
        assert [example["id"] for example in prepared] == ["0", "1", "2"]
        assert collate(prepared)["chosen_pixel_values"].shape == (3, 3, 16, 16)

    @pytest.mark.parametrize("declared", [False, True])
    def test_a_stream_must_have_ids(self, declared):
        """Processes and workers that share a stream would each count its rows from 0, so it is refused without ids."""
        rows = [row(), row(), row()]
        stream = Dataset.from_list(rows).to_iterable_dataset() if declared else None
        stream = stream or IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match="`train_dataset` is a stream without the column `id`.*`dataset.map`"):
            prepare(stream)

    @pytest.mark.parametrize("stream", [False, True])
    def test_images_stay_undecoded(self, stream):
        """Prepared rows hold encoded images, so that one that cannot be read stops at the row that has it."""
        dataset = tiny.pairs(2)
        prepared = prepare(dataset.to_iterable_dataset() if stream else dataset)
        for example in prepared:
            assert example["chosen"].keys() == example["rejected"].keys() == {"bytes", "path"}
        assert dataset.features["chosen"].decode, "the caller's dataset is left as it was"

    def test_pictures_bytes_and_paths_are_the_same(self, tmp_path):
        """A PIL image, its bytes, a path and an undecoded column give the same training tensor."""
        image = tiny.image(5)
        image.save(tmp_path / "image.png")
        data = encoded(image)
        values = [image, data, str(tmp_path / "image.png"), {"bytes": data, "path": None}]
        values += [{"bytes": None, "path": str(tmp_path / "image.png")}, {"bytes": data, "path": "moved.png"}]
        batch = collate([row(id=str(index), chosen=value) for index, value in enumerate(values)])
        for pixel_values in batch["chosen_pixel_values"]:
            assert (pixel_values == batch["chosen_pixel_values"][0]).all()
        assert not (batch["rejected_pixel_values"][0] == batch["chosen_pixel_values"][0]).all()

    def test_image_folder(self, tmp_path):
        """
        A folder of images with `chosen_file_name`, `rejected_file_name` and a list of objects in its metadata.jsonl loads
        as a pair dataset and goes through.
        """
        (tmp_path / "images").mkdir()
        lines = []
        for index, instances in enumerate([[instance(), instance(preference="tie")], []]):
            line = {"prompt": "a dog", "instances": instances}
            for image, column in enumerate(COLUMNS[1:]):
                file_name = f"images/{index}-{column}.png"
                tiny.image(2 * index + image).save(tmp_path / file_name)
                line[f"{column}_file_name"] = file_name
            lines.append(json.dumps(line))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

        dataset = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
        assert set(dataset.column_names) == {"prompt", "chosen", "rejected", "instances"}
        assert isinstance(dataset.features["chosen"], Image)
        batch = collate(prepare(dataset))
        assert batch["judged"].tolist() == [[True, False], [False, False]]
        assert batch["conflicts"].tolist() == [[True, False], [False, False]]
        expected = collate([row(id=str(i), chosen=tiny.image(2 * i), rejected=tiny.image(2 * i + 1)) for i in (0, 1)])
        for column in COLUMNS[1:]:
            assert (batch[f"{column}_pixel_values"] == expected[f"{column}_pixel_values"]).all()


class TestValues:
    @pytest.mark.parametrize(
        ("box", "reason"),
        [
            ([0, 0, 5], "not a list of four numbers"),
            ([0, 0, 5, 5, 5], "not a list of four numbers"),
            (None, "not a list of four numbers"),
            ("0, 0, 5, 5", "not a list of four numbers"),
            ([0, 0, math.nan, 5], "not a finite number"),
            ([0, 0, math.inf, 5], "not a finite number"),
            ([0, 0, None, 5], "not a finite number"),
            ([5, 0, 2, 5], "inverted or empty"),
            ([0, 5, 5, 2], "inverted or empty"),
            ([3, 0, 3, 5], "inverted or empty"),
            ([0, 3, 5, 3], "inverted or empty"),
            ([-1.5, 0, 5, 5], "40 pixels wide and 32 high"),
            ([0, -1.5, 5, 5], "40 pixels wide and 32 high"),
            ([0, 0, 41.5, 5], "40 pixels wide and 32 high"),
            ([0, 0, 5, 33.5], "40 pixels wide and 32 high"),
        ],
    )
    def test_bad_box(self, box, reason):
        """A box that is none, is inverted or lies outside of its 40 x 32 image is refused, and the message says which."""
        with pytest.raises(ValueError, match=reason):
            check_box(box, 40, 32)

    @pytest.mark.parametrize("box", [[0, 0, 40, 32], [-1, -1, 41, 33], [0.5, 0.25, 1, 31.75], (1, 2, 3, 4)])
    def test_good_box(self, box):
        """A box of numbers that reaches at most one pixel outside is returned as it is."""
        assert check_box(box, 40, 32) == list(box)

    @pytest.mark.parametrize(("index", "name"), list(enumerate(PREFERENCES)))
    def test_preference(self, index, name):
        """A preference is read from its name and from its number alike."""
        assert check_preference(name) == check_preference(index) == name

    @pytest.mark.parametrize("preference", ["better", "Chosen", "", 3, -1, None, 0.5])
    def test_bad_preference(self, preference):
        """Any other name or number is refused with the names that there are."""
        with pytest.raises(ValueError, match="is none of `chosen`, `rejected`, `tie`"):
            check_preference(preference)

    @pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
    def test_no_image(self, value):
        """A value that holds no image is refused."""
        with pytest.raises(ValueError, match="expected an image, its bytes or a path, got"):
            open_image(value)

    def test_open_image_keeps_the_stored_pixels(self):
        """An image comes as it is stored, its EXIF orientation not applied and still readable."""
        image = tiny.image(0)
        image.getexif()[0x0112] = 6
        opened = open_image({"bytes": encoded(image), "path": None})
        assert opened.size == (40, 32)
        assert opened.getexif()[0x0112] == 6
