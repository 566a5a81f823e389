# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


import io
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    attribute_features,
)
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.data.collators import AttributeCollator
from trl_diffusion.data.formats import check_attribute_columns, check_attributes, prepare_dataset


CRITERIA = parse_criteria(tiny.CRITERIA, "tiny.yaml")  # hue, kind, pet
COLUMNS = ("prompt", "image", "positive_attributes", "negative_attributes")


def row(id: str = "row-0", positive=("hue",), negative=("pet",), **changes) -> dict:
    columns = {"positive_attributes": positive, "negative_attributes": negative}
    columns = {name: list(ids) if isinstance(ids, tuple) else ids for name, ids in columns.items()}
    return {"id": id, "prompt": "a cat", "image": tiny.image(0)} | columns | changes


def dataset(*rows: dict, features: Features | None = None) -> Dataset:
    return Dataset.from_list(list(rows), features=features)


def checked(data, allow_none: bool = False):
    """What a trainer does with a dataset."""
    data = prepare_dataset(data, "train_dataset", COLUMNS, ("image",))
    check_attribute_columns(data, "train_dataset", CRITERIA, allow_none)
    return data


def collate(data, **kwargs) -> dict:
    return AttributeCollator(8, criteria=CRITERIA, **kwargs)(list(data))


def attributes(batch: dict) -> list:
    return list(zip(batch["positive_attributes"], batch["negative_attributes"]))


def half(width: int = 12, height: int = 8) -> PILImage.Image:
    """Black, its left third white: tells by its columns whether it was flipped and where it was cropped."""
    image = PILImage.new("RGB", (width, height))
    image.paste("white", (0, 0, width // 3, height))
    return image


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    return buffer.getvalue()


class TestFeatures:
    def test_without_criteria(self):
        """The columns are those that the documentation names; attributes are lists of strings."""
        features = attribute_features()
        assert list(features) == ["id", "prompt", "image", "positive_attributes", "negative_attributes"]
        assert isinstance(features["image"], Image)
        assert features["positive_attributes"] == features["negative_attributes"] == List(Value("string"))

    def test_with_criteria(self):
        """Attributes are labels, in the order of the tree, so that an integer is an index into it."""
        features = attribute_features(CRITERIA)
        assert features["positive_attributes"].feature.names == ["hue", "kind", "pet"]
        assert features["negative_attributes"].feature.names == ["hue", "kind", "pet"]

    def test_labels_refuse_what_the_tree_lacks(self):
        """A dataset with labels cannot hold an unknown attribute in the first place."""
        with pytest.raises(ValueError, match="hues"):
            dataset(row(positive=("hues",)), features=attribute_features(CRITERIA))


class TestAccepted:
    @pytest.mark.parametrize("stream", [False, True])
    def test_ids_and_labels_are_the_same(self, stream):
        """Attributes stored as strings and as `ClassLabel` integers give the same batch."""
        rows = list(tiny.paintings(6))
        rows = [{name: example[name] for name in attribute_features()} for example in rows]
        batches = []
        for criteria in (None, CRITERIA):
            data = dataset(*rows, features=attribute_features(criteria))
            assert isinstance(data[3]["positive_attributes"][0], int if criteria else str)
            batches.append(collate(checked(data.to_iterable_dataset() if stream else data)))
        assert attributes(batches[0]) == attributes(batches[1])
        assert attributes(batches[0])[3] == (["pet", "kind"], ["hue"])
        for name, value in batches[0].items():
            assert torch.equal(value, batches[1][name]) if torch.is_tensor(value) else value == batches[1][name]

    def test_undeclared_integers_are_indices(self):
        """Integers without labels count the leaves, as in a batch of a dataset whose labels were lost on the way."""
        assert attributes(collate(checked(dataset(row(positive=(2, 0), negative=(1,)))))) == [
            (["pet", "hue"], ["kind"])
        ]

    @pytest.mark.parametrize("none", [None, []])
    def test_no_attributes_of_a_kind(self, none):
        """A list that is empty or null has none, also where it is so in every row."""
        rows = [row("0", negative=none), row("1", negative=none)]
        for data in (dataset(*rows), dataset(*rows, features=attribute_features())):
            assert attributes(collate(checked(data))) == [(["hue"], [])] * 2

    def test_tuples(self):
        """A collator takes any sequence of ids."""
        assert attributes(collate([row() | {"positive_attributes": ("hue", "kind")}])) == [(["hue", "kind"], ["pet"])]

    def test_the_rows_order_stays(self):
        """Ids come in the order of the row, not of the tree."""
        assert check_attributes(row(positive=("pet", "hue"), negative=("kind",)), CRITERIA) == (
            ["pet", "hue"],
            ["kind"],
        )

    def test_extra_columns_pass_through(self):
        """Columns that the trainer does not know stay in the rows, and out of the batch."""
        data = checked(tiny.paintings(2).add_column("painter", ["x", "y"]))
        assert data["painter"] == ["x", "y"]
        assert set(collate(data)) == {
            "id",
            "prompt",
            "image_pixel_values",
            "image_original_sizes",
            "image_crop_top_lefts",
            "positive_attributes",
            "negative_attributes",
        }

    def test_missing_ids_are_row_numbers(self):
        """Rows in memory without an id get their number as one, by which a message then names them."""
        data = tiny.paintings(3).remove_columns("id")
        assert collate(checked(data, allow_none=True))["id"] == ["0", "1", "2"]
        bad = data.map(lambda _, index: {"positive_attributes": ["hues"] if index == 2 else []}, with_indices=True)
        with pytest.raises(ValueError, match="the row with id '2'"):
            checked(bad)

    def test_ids_that_are_integers(self):
        """They become strings in a batch, and draw the crops of the same ids as strings."""
        rows = [row(id=index, image=half()) for index in range(8)]
        numbers = collate(checked(dataset(*rows)), center_crop=False)
        strings = collate(checked(dataset(*[{**one, "id": str(one["id"])} for one in rows])), center_crop=False)
        assert numbers["id"] == [str(index) for index in range(8)]
        assert torch.equal(numbers["image_pixel_values"], strings["image_pixel_values"])

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    @pytest.mark.parametrize("labels", [False, True])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_format_changes_nothing(self, kind, labels, stream):
        """A dataset or stream formatted for numpy or torch gives the same batch."""
        data = tiny.paintings(4).cast(attribute_features(CRITERIA if labels else None))
        formatted = (data.to_iterable_dataset() if stream else data).with_format(kind)
        plain, batch = collate(checked(data)), collate(checked(formatted))
        assert attributes(batch) == attributes(plain)
        assert batch["id"] == plain["id"]
        assert torch.equal(batch["image_pixel_values"], plain["image_pixel_values"])

    def test_a_transform_of_the_users_is_what_is_checked(self):
        """Where a transform turns a vocabulary of the user's into ids, its result is the rows, at start-up as well."""
        vocabulary = {"farbe": "hue", "tier": "pet"}

        def translate(rows):
            for column in ("positive_attributes", "negative_attributes"):
                if column in rows:
                    rows[column] = [[vocabulary[name] for name in names] for names in rows[column]]
            return rows

        data = dataset(row(positive=("farbe",), negative=("tier",))).with_transform(translate)
        assert attributes(collate(checked(data))) == [(["hue"], ["pet"])]


class TestRefused:
    @pytest.mark.parametrize("column", ["positive_attributes", "negative_attributes"])
    @pytest.mark.parametrize("names", [["pet", "kind", "hue"], ["hue", "kind"], ["hue", "kind", "pet", "x"], ["a"]])
    @pytest.mark.parametrize("stream", [False, True])
    def test_other_labels(self, column, names, stream):
        """Labels of another order or tree are refused, in a stream too: their integers would mean other attributes."""
        features = attribute_features() | {column: List(ClassLabel(names=names))}
        data = dataset(row(positive=(names[0],), negative=(names[0],)), features=Features(features))
        with pytest.raises(ValueError, match=f"The labels of `{column}` of `train_dataset` are not .*'tiny'") as error:
            checked(data.to_iterable_dataset() if stream else data)
        assert "store ids as strings" in str(error.value)

    @pytest.mark.parametrize("column", ["positive_attributes", "negative_attributes"])
    @pytest.mark.parametrize(
        ("name", "nearest"), [("hues", "hue"), ("Pet", "pet"), ("circle", "kind"), ("dog", "pet"), ("reds", "hue")]
    )
    def test_unknown_attribute(self, column, name, nearest):
        """A misspelt id, or a form in its place, names row, column and the id that was meant."""
        bad = row("row-7", positive=("kind",), negative=()) | {column: [name]}
        with pytest.raises(ValueError, match=f"`{column}` of the row with id 'row-7': {name!r} is no attri") as error:
            check_attributes(bad, CRITERIA)
        assert f"the nearest is {nearest!r}" in str(error.value)
        with pytest.raises(ValueError, match="'row-7'"):
            checked(dataset(row(), bad))

    @pytest.mark.parametrize("value", [-1, 3, 1.0, True, None, ["hue"], {"id": "hue"}, ""])
    def test_what_is_no_attribute(self, value):
        """A label that is missing (-1), null, a truth value or a list in a list names row and column."""
        with pytest.raises(ValueError, match="`negative_attributes` of the row with id 'row-7'.*no attribute of"):
            check_attributes(row("row-7", negative=[value]), CRITERIA)

    @pytest.mark.parametrize("value", ["hue", "", 0, 1, False, True, {"hue": 1}, {}, b"hue", {"hue"}, 0.0])
    def test_no_list(self, value):
        """One id instead of a list, or whatever else is no list, is refused with its row, column and value."""
        with pytest.raises(
            ValueError, match="`positive_attributes` of the row with id 'row-7' must be a list"
        ) as error:
            check_attributes(row("row-7") | {"positive_attributes": value}, CRITERIA)
        assert repr(value) in str(error.value)

    def test_one_label_instead_of_a_list(self):
        """A column of single labels is refused, also where all of them are the first, whose number is 0."""
        features = Features(attribute_features() | {"positive_attributes": ClassLabel(names=["hue", "kind", "pet"])})
        with pytest.raises(ValueError, match="`positive_attributes` of.*must be a list"):
            checked(dataset(row(positive="hue"), features=features))

    @pytest.mark.parametrize("values", [["hue", "hue"], [0, 0], ["hue", 0], ["kind", "hue", "pet", "hue"]])
    @pytest.mark.parametrize("column", ["positive_attributes", "negative_attributes"])
    def test_twice_in_a_column(self, column, values):
        """An attribute that a column has twice, under whatever name, is named by its id."""
        bad = row("row-7", positive=(), negative=()) | {column: values}
        with pytest.raises(ValueError, match=f"`{column}` of the row with id 'row-7' has `hue` twice"):
            check_attributes(bad, CRITERIA)

    def test_both_sides(self):
        """All attributes that are positive and negative at once are named, also where one is given by its number."""
        with pytest.raises(ValueError, match="id 'row-7' has `hue`, `pet` as positive and as negative at once"):
            check_attributes(row("row-7", positive=("pet", 0), negative=("kind", "hue", "pet")), CRITERIA)

    def test_rows_without_attributes_are_named_together(self):
        """The message has their number, the first 20 of their ids in the order of the dataset, and the way out."""
        bare = [row(f"bare-{index}", positive=(), negative=None, image=tiny.image(0, 8, 8)) for index in range(25)]
        data = dataset(row("good"), *bare[:10], row("better"), *bare[10:], features=attribute_features())
        with pytest.raises(ValueError, match="^25 of the 27 rows of `train_dataset`") as error:
            checked(data)
        listed = ", ".join(f"bare-{index}" for index in range(20))
        assert f"the rows with id {listed} and 5 more." in str(error.value)
        assert "good" not in str(error.value) and "dataset.filter" in str(error.value)
        assert len(checked(data, allow_none=True)) == 27

    def test_the_way_out_works(self):
        """The filter that the message gives leaves the rows that have attributes."""
        data = tiny.paintings(3)
        data = data.map(lambda _, index: {"negative_attributes": []} if index == 2 else {}, with_indices=True)
        with pytest.raises(ValueError, match="rows with id row-2") as error:
            checked(data)
        lambda_text = re.search(r"dataset\.filter\((.*?)\)`", str(error.value)).group(1)
        assert checked(data.filter(eval(lambda_text)))["id"] == ["row-0", "row-1"]

    @pytest.mark.parametrize("number", [1, 20, 21])
    def test_the_list_of_20_has_an_end(self, number):
        """Up to 20 are all there; of 21, one more is counted."""
        with pytest.raises(ValueError) as error:
            checked(dataset(*[row(str(100 + index), (), ()) for index in range(number)], row("good")))
        assert ("and 1 more" in str(error.value)) == (number == 21)
        assert "119" in str(error.value) or number == 1
        assert "120" not in str(error.value)

    def test_streams_are_checked_at_collation(self):
        """A stream is not read at start-up; its row is named in the batch that has it."""
        rows = [row(), row("row-7", positive=("hues",))]

        def stop():
            raise AssertionError("the stream was read")
            yield

        checked(IterableDataset.from_generator(stop, features=attribute_features()))
        stream = checked(dataset(*rows).to_iterable_dataset())
        with pytest.raises(ValueError, match="'row-7'.*the nearest is 'hue'"):
            collate(stream)

    @pytest.mark.parametrize("missing", COLUMNS)
    def test_missing_column(self, missing):
        """A missing column is named with those that there are."""
        with pytest.raises(ValueError, match=f"`train_dataset` lacks the column `{missing}`; it has `id`"):
            checked(tiny.paintings(2).remove_columns(missing))

    def test_a_null_id(self):
        """It is refused when the batch is made, as in every dataset."""
        with pytest.raises(ValueError, match="A row has no `id`"):
            collate(checked(dataset(row(id=None), row("b"))))

    @pytest.mark.parametrize(
        "value",
        [
            b"not an image",
            {"bytes": png(tiny.image(0))[:-200], "path": None},
            {"bytes": None, "path": "no/such/file.png"},
            "no/such/file.png",
            None,
        ],
        ids=["garbage", "truncated", "missing", "missing path", "none"],
    )
    def test_unreadable_image(self, value):
        """An image that cannot be read names its row and the way out."""
        with pytest.raises(ValueError, match="column `image` of the row with id 'row-7' cannot be read") as error:
            collate([row(), row("row-7", image=value)])
        assert "dataset.filter" in str(error.value)

    def test_an_unreadable_image_in_a_dataset(self):
        """It is not decoded on the way, where nothing would name its row."""
        data = dataset(row(), row("row-7"), features=attribute_features())
        broken = {"bytes": b"not an image", "path": None}
        data = data.cast_column("image", Image(decode=False))
        data = data.map(lambda one: {"image": broken} if one["id"] == "row-7" else {}).cast_column("image", Image())
        with pytest.raises(ValueError, match="column `image` of the row with id 'row-7' cannot be read"):
            collate(checked(data))

    @pytest.mark.parametrize("prompt", [None, 3, ["a cat"]])
    def test_bad_prompt(self, prompt):
        """A prompt that is no string names its row."""
        with pytest.raises(ValueError, match="`prompt` of the row with id 'row-7' must be a string"):
            collate([row(), row("row-7", prompt=prompt)])


class TestBatch:
    def test_by_hand(self):
        """A 40 x 32 image at resolution 32 loses 4 columns on either side; everything else is as the row has it."""
        batch = AttributeCollator(32, criteria=CRITERIA)(
            [row("x", image=tiny.image(0)), row("y", (), ("hue", "kind"))]
        )
        crop = torch.tensor(list(tiny.image(0).crop((4, 0, 36, 32)).tobytes())).reshape(32, 32, 3).permute(2, 0, 1)
        assert torch.equal(batch["image_pixel_values"][0], crop.byte())
        assert batch["image_pixel_values"].shape == (2, 3, 32, 32)
        assert batch["image_pixel_values"].dtype == torch.uint8
        assert batch["image_original_sizes"].tolist() == [[32, 40]] * 2
        assert batch["image_crop_top_lefts"].tolist() == [[0, 4]] * 2
        assert (batch["id"], batch["prompt"]) == (["x", "y"], ["a cat", "a cat"])
        assert attributes(batch) == [(["hue"], ["pet"]), ([], ["hue", "kind"])]

    def test_same_row_same_augmentation_in_every_batch(self):
        """Crops and flips depend on seed and id alone: not on neighbours, prompt, attributes or torch."""
        collator = AttributeCollator(8, criteria=CRITERIA, center_crop=False, random_flip=True)
        rows = [row(str(index), image=half(24, 12)) for index in range(12)]
        together = collator(rows)
        for index in (0, 3, 11):
            torch.manual_seed(index)
            np.random.seed(index)
            changed = {**rows[index], "prompt": "a dog", "positive_attributes": [], "negative_attributes": ["kind"]}
            for batch, place in ((collator([rows[index]]), 0), (collator([rows[5], changed]), 1)):
                for key in ("image_pixel_values", "image_crop_top_lefts", "image_original_sizes"):
                    assert torch.equal(batch[key][place], together[key][index])
        assert len({tuple(crop) for crop in together["image_crop_top_lefts"].tolist()}) > 3

    def test_the_global_generator_is_left_alone(self):
        """Collating draws nothing from torch's global generator."""
        state = torch.get_rng_state()
        AttributeCollator(8, criteria=CRITERIA, center_crop=False, random_flip=True)([row()])
        assert torch.equal(torch.get_rng_state(), state)

    def test_seed_changes_the_augmentation(self):
        """Another seed draws other crops."""
        rows = [row(str(index), image=half()) for index in range(16)]
        crops = [collate(rows, center_crop=False, seed=seed)["image_crop_top_lefts"].tolist() for seed in (0, 1)]
        assert crops[0] != crops[1]

    def test_half_of_the_images_are_flipped(self):
        """Of 160, 80 +- 5 standard deviations; and none unless asked for."""
        rows = [row(str(index), image=half(8)) for index in range(160)]
        flipped = (collate(rows, random_flip=True)["image_pixel_values"][:, 0, 0, 0] < 128).sum().item()
        assert abs(flipped - 80) < 5 * 40**0.5
        assert (collate(rows)["image_pixel_values"][:, 0, 0, 0] >= 128).all()

    def test_crops_say_where_they_were(self):
        """All five offsets occur, and the pixels are those of the offset."""
        batch = collate([row(str(index), image=half()) for index in range(60)], center_crop=False)
        lefts = batch["image_crop_top_lefts"][:, 1].tolist()
        assert set(lefts) == {0, 1, 2, 3, 4}
        assert (batch["image_pixel_values"][:, 0, 0] >= 128).sum(dim=1).tolist() == [4 - left for left in lefts]

    @pytest.mark.parametrize("stream", [False, True])
    def test_exif_orientation_survives_a_dataset(self, stream):
        """An image stored on its side comes upright."""
        image = half(24, 16)
        image.getexif()[0x0112] = 6
        data = dataset(row(image={"bytes": png(image), "path": None}), features=attribute_features())
        batch = collate(checked(data.to_iterable_dataset() if stream else data))
        assert batch["image_original_sizes"].tolist() == [[24, 16]]
        white = (batch["image_pixel_values"][0, 0] >= 128).float().mean(dim=1)
        assert white[0] == 1 and white[-1] == 0, "its white third, at the left as stored, is at the top"


SETTINGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_steps": 1}


@pytest.fixture(scope="module")
def criteria_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


@pytest.fixture(scope="module")
def expert(tmp_path_factory, criteria_file) -> AttributeSFTTrainer:
    args = AttributeSFTConfig(str(tmp_path_factory.mktemp("expert")), criteria=criteria_file, **SETTINGS)
    return AttributeSFTTrainer(tiny.sd_pipeline(), args)


class TestTrainers:
    @pytest.fixture(params=["sft", "cpo"])
    def make(self, request, tmp_path, criteria_file, expert):
        def make(train_dataset, eval_dataset=None):
            data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            if request.param == "sft":
                args = AttributeSFTConfig(str(tmp_path), criteria=criteria_file, **SETTINGS)
                return AttributeSFTTrainer(tiny.sd_pipeline(), args, **data)
            args = ComplexPOConfig(str(tmp_path), criteria=criteria_file, **SETTINGS)
            return ComplexPOTrainer(tiny.sd_pipeline(), expert, args, **data)

        make.allows_none = request.param == "sft"
        return make

    def test_labels_and_ids(self, make):
        """Both trainers take ids and labels, and give their collators the same batch."""
        batches = []
        for criteria in (None, CRITERIA):
            trainer = make(tiny.paintings(4).cast(attribute_features(criteria)))
            batches.append(trainer.data_collator(list(trainer.train_dataset)))
        assert attributes(batches[0]) == attributes(batches[1]) == attributes(collate(tiny.paintings(4)))
        assert torch.equal(batches[0]["image_pixel_values"], batches[1]["image_pixel_values"])

    def test_bad_evaluation_rows_are_named(self, make):
        """Each of several datasets to evaluate on is checked, under its own name."""
        bad = dataset(row("row-7", positive=("hues",)), features=attribute_features())
        with pytest.raises(ValueError, match="'row-7'.*the nearest is 'hue'"):
            make(tiny.paintings(2), {"good": tiny.paintings(2), "bad": bad})
        labels = Features(attribute_features() | {"negative_attributes": List(ClassLabel(names=["pet", "kind"]))})
        with pytest.raises(ValueError, match=r"`negative_attributes` of `eval_dataset\['bad'\]`"):
            make(tiny.paintings(2), {"bad": dataset(row(), features=labels)})

    def test_rows_without_attributes(self, make):
        """They teach the expert the prompt alone; preference optimisation learns nothing from them, and says so."""
        data = dataset(row("bare", (), ()), row(), features=attribute_features())
        if make.allows_none:
            assert len(make(data).train_dataset) == 2
            return
        with pytest.raises(ValueError, match="^1 of the 2 rows of `train_dataset`.*with id bare"):
            make(data)
        with pytest.raises(ValueError, match="^1 of the 2 rows of `eval_dataset`.*with id bare"):
            make(tiny.paintings(2), data)

    def test_pairs_of_another_trainer(self, make):
        """A dataset of image pairs is refused with the columns that it lacks."""
        with pytest.raises(
            ValueError, match="lacks the columns `image`, `positive_attributes`, `negative_attributes`"
        ):
            make(tiny.pairs(2))
