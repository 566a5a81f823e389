# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The role of the segmenter: what it fills in, what it records, and what is written, joined and shown of it."""

import io
import json
import re
from functools import partial

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset

from tests.annotation.test_run import Crash, Dying, contents, read, world
from trl_diffusion import join_annotations, load_annotations, save_annotations
from trl_diffusion.annotation import images
from trl_diffusion.annotation.detector import Detection, Detector
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.instances import count_masks, instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.preview import outline, preview
from trl_diffusion.annotation.records import Instance, PairRecord, pair_columns, prepare_rows
from trl_diffusion.annotation.run import MANIFEST, Run, run, run_locally
from trl_diffusion.annotation.segmenter import Segmenter
from trl_diffusion.annotation.tables import PAIR_ANNOTATION_FEATURES, PAIR_MASK_FEATURES
from trl_diffusion.boxes import orient_boxes
from trl_diffusion.cli.main import main
from trl_diffusion.data.check import check_dataset
from trl_diffusion.quickstart import world as scenes
from trl_diffusion.quickstart.oracle import OracleDetector, OracleSegmenter, OracleVLM, colored_pixels
from trl_diffusion.segmentation import decode_rle


class Painted(Segmenter):
    """Finds the red pixels of an image, wherever the box is."""

    def describe(self):
        return {"model": "painted", "revision": "1"}

    def segment(self, queries):
        return [np.asarray(image)[..., 0] > 128 for image, _ in queries]


class Answers(Segmenter):
    """Gives the same answers to all."""

    def __init__(self, *answers):
        self.answers, self.queries = answers, []

    def describe(self):
        return {"model": "answers", "revision": "1"}

    def segment(self, queries):
        self.queries += queries
        return list(self.answers)


def stored(pixels: np.ndarray, orientation: int = 1) -> StoredImage:
    buffer, exif = io.BytesIO(), PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(pixels).save(buffer, format="PNG", exif=exif)
    return StoredImage(buffer.getvalue())


def pair(chosen: StoredImage, rejected: StoredImage, *instances: Instance) -> PairRecord:
    return PairRecord("id", "a thing", chosen=chosen, rejected=rejected, instances=list(instances))


def thing(label: str = "thing", box: tuple[float, ...] = (0.25, 0.25, 0.75, 0.75)) -> Instance:
    return Instance(label, list(box), list(box), 0.9, 0.8)


def black(height: int = 8, width: int = 12) -> StoredImage:
    return stored(np.zeros((height, width, 3), np.uint8))


# ----- the role -----


def test_an_instance_without_a_usable_mask_keeps_its_box():
    """Nothing, an empty mask, and one outside of the box are recorded with label, image and reason; the others are masks."""
    inside, outside = np.zeros((2, 8, 12), bool)
    inside[4, 6], outside[0, 0] = True, True
    segmenter = Answers(None, inside, np.zeros((8, 12), bool), outside)
    record = pair(black(), black(), thing("cow"), thing("tree"))
    assert segmenter([record]) == [record] and record.status == "ok"
    assert [box for _, box in segmenter.queries] == [[0.25, 0.25, 0.75, 0.75]] * 4
    assert record.without_mask == [
        {"label": "cow", "image": "chosen", "reason": "there is no mask"},
        {"label": "tree", "image": "chosen", "reason": "the mask is empty"},
        {"label": "tree", "image": "rejected", "reason": "the mask has nothing of the box"},
    ]
    cow, tree = record.to_row()["instances"]
    assert cow["chosen_mask"] is tree["chosen_mask"] is tree["rejected_mask"] is None
    assert (decode_rle(cow["rejected_mask"]) == inside).all()
    assert cow["chosen_box"] == tree["rejected_box"] == [3.0, 2.0, 9.0, 6.0]
    row = PAIR_MASK_FEATURES.encode_example(record.to_row())
    counts = count_masks([row])
    assert (counts["instances"], counts["masks"], counts["without_mask"]) == (2, 1, 3)


@pytest.mark.parametrize("x, y", [(3, 2), (8, 2), (3, 5), (8, 5)])
def test_a_mask_that_only_touches_the_box_counts(x, y):
    """A pixel in any corner of the box is enough, and the pixels just outside of it are not."""
    masks = np.zeros((2, 8, 12), bool)
    masks[0, y, x] = True
    masks[1, y + (1 if y > 3 else -1), x] = True
    record = pair(black(), black(), thing())
    Answers(*masks)([record])
    assert [lack["image"] for lack in record.without_mask] == ["rejected"]


@pytest.mark.parametrize(
    "answer", [np.zeros((12, 8), bool), np.ones((8, 12), np.uint8), [[True]], np.zeros((1, 8, 12), bool), 0]
)
def test_what_is_no_mask_of_the_image_fails_the_row(answer):
    """An answer of another shape or type makes the row an error that names role, instance and size; other rows stay."""
    records = [pair(black(), black(), thing("cow")), pair(black(), black(), thing("tree"))]
    good = np.ones((8, 12), bool)
    Answers(good, answer, good, good)(records)
    assert [record.status for record in records] == ["error", "ok"]
    assert records[0].reason.startswith("segmenter, 'cow': ") and records[0].reason.endswith(
        "no mask of 12 x 8 pixels"
    )
    assert records[0].to_row()["instances"] == [] and len(records[1].to_row()["instances"]) == 1


def test_every_query_has_an_answer():
    """A segmenter that leaves a query out is refused."""
    with pytest.raises(ValueError, match="gave 1 answers to 2 queries"):
        Answers(None)([pair(black(), black(), thing())])


def test_rows_that_are_not_ok_are_not_segmented():
    """Rejected and broken rows pass unchanged, without queries."""
    rejected, broken = pair(black(), black(), thing()), pair(black(), black(), thing())
    rejected.reject("tie")
    broken.fail("chosen: broken")
    segmenter = Answers()
    segmenter([rejected, broken])
    assert segmenter.queries == [] and rejected.without_mask == broken.without_mask == []


# ----- where masks are -----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_those_of_the_stored_image(orientation):
    """Red pixels that are found in the upright image are, as they are written, the red pixels of the file."""
    rng = np.random.default_rng(orientation)
    pixels = np.zeros((9, 14, 3), np.uint8)
    pixels[2:7, 3:11, 0] = 255 * (rng.random((5, 8)) < 0.5)
    stored_box = np.array([3 / 14, 2 / 9, 11 / 14, 7 / 9])
    box = orient_boxes(images.torch.tensor(stored_box), orientation).tolist()
    image = stored(pixels, orientation)
    record = pair(image, image, thing(box=box))
    Painted()([record])
    (row,) = record.to_row()["instances"]
    for name in ("chosen", "rejected"):
        assert row[f"{name}_box"] == pytest.approx([3, 2, 11, 7], abs=1e-5)
        assert (decode_rle(row[f"{name}_mask"]) == (pixels[..., 0] > 0)).all()


def test_masks_of_a_large_image_have_its_size(monkeypatch):
    """The roles see a smaller image; the mask has the size of the file, and covers what is red to a pixel of the smaller image."""
    monkeypatch.setattr(images, "MOST_PIXELS", 60 * 40)
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[20:60, 30:90, 0] = 255
    image = stored(pixels, 6)
    assert image.upright.size == (40, 60)
    record = pair(image, image, thing())
    Painted()([record])
    mask = decode_rle(record.to_row()["instances"][0]["chosen_mask"])
    assert mask.shape == (80, 120)
    assert mask[22:58, 32:88].all() and mask.sum() == mask[18:62, 28:92].sum()


def test_the_oracle_outlines_shapes():
    """In 200 scenes the oracle's mask is exactly where a shape, with its bite, covers at least half of a pixel."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        image = scenes.render(scene)
        for shape in scene.shapes:
            mask = colored_pixels(image, [side / scenes.SIZE for side in shape.box])
            assert (mask == (scenes.coverage(shape) >= 0.5)).all()


# ----- a run -----


def make_task(columns, segmenter=None, detector=None):
    vlm = OracleVLM()
    roles = Planner(vlm), detector or OracleDetector(), Judge(vlm, crop_size=64)
    source = {"name": "world", "split": "train"}
    return instance_task(*roles, source, columns, rows_per_shard=4, segmenter=segmenter)


def annotate(dataset, folder, segmenter=None) -> Run:
    rows, columns = prepare_rows(dataset, pair_columns)
    return run(rows, make_task(columns, segmenter), folder, run_locally, disable_tqdm=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return annotate(world(10), tmp_path_factory.mktemp("segmented"), OracleSegmenter())


def test_without_a_segmenter_nothing_changes(tmp_path):
    """Description, columns and counts of a run have no word of masks, and its folder has the name that it always had."""
    plain = annotate(world(2), tmp_path)
    assert plain.task.features == PAIR_ANNOTATION_FEATURES
    written = (plain.folder / MANIFEST).read_text() + json.dumps(read(plain.folder))
    assert "mask" not in written and "segmenter" not in written
    assert len(plain.task.roles) == 3


def test_a_segmenter_changes_nothing_but_masks(finished, tmp_path):
    """Boxes, scores, verdicts and all raw answers are those of a run without it, in another folder, which stays as it is."""
    plain = annotate(world(10), tmp_path)
    before = contents(plain.folder)
    rows = read(annotate(world(10), tmp_path, OracleSegmenter()).folder)
    assert contents(plain.folder) == before and len(list(tmp_path.iterdir())) == 2
    assert rows == read(finished.folder)
    for row in rows:
        assert row.pop("without_mask") == []
        for instance in row["instances"]:
            assert instance.pop("chosen_mask") and instance.pop("rejected_mask")
    assert rows == read(plain.folder)


def test_masks_are_counted(finished):
    """The manifest names the segmenter and counts two masks for each instance."""
    manifest = json.loads((finished.folder / MANIFEST).read_text())
    assert manifest["segmenter"] == {"model": "oracle", "revision": "1"}
    counts = manifest["counts"]
    assert (counts["instances"], counts["masks"], counts["without_mask"]) == (20, 40, 0)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_run_that_dies_goes_on(number, finished, tmp_path, monkeypatch):
    """A run with a segmenter that dies at a file ends with the same files as one that does not."""
    with monkeypatch.context() as patch:
        Dying(patch, number, after=True)
        with pytest.raises(Crash):
            annotate(world(10), tmp_path, OracleSegmenter())
    assert contents(annotate(world(10), tmp_path, OracleSegmenter()).folder) == contents(finished.folder)


class Whole(Detector):
    """Finds everything in the whole image."""

    def describe(self):
        return {"model": "whole", "revision": "1"}

    def detect(self, queries):
        return [Detection([0.0, 0.0, 1.0, 1.0], 0.5) for _ in queries]


class Chosen(Segmenter):
    """Has a mask for every other image."""

    def describe(self):
        return {"model": "chosen", "revision": "1"}

    def segment(self, queries):
        return [
            None if place % 2 else np.ones(np.asarray(image).shape[:2], bool)
            for place, (image, _) in enumerate(queries)
        ]


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Run:
    """A run in which instances have masks in the chosen images alone."""
    rows, columns = prepare_rows(world(4), pair_columns)
    task = make_task(columns, Chosen(), Whole())
    return run(rows, task, tmp_path_factory.mktemp("half"), run_locally, disable_tqdm=True)


# ----- joined with the source -----


def pixels_of(mask) -> np.ndarray | None:
    """A mask of a joined row, decoded or not."""
    if isinstance(mask, dict):
        mask = PIL.Image.open(io.BytesIO(mask["bytes"]))
    return None if mask is None else np.asarray(mask)


def masks_of(rows) -> list[list[np.ndarray | None]]:
    return [
        [pixels_of(instance[f"{name}_mask"]) for row in rows for instance in row["instances"]]
        for name in ("chosen", "rejected")
    ]


def same(first: list[list], second: list[list]) -> bool:
    return all(
        np.array_equal(a, b) if a is not None and b is not None else a is b
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def streamed(source: Dataset):
    return source.to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
@pytest.mark.parametrize("which", ["finished", "half"])
def test_a_joined_dataset_has_the_masks(kind, which, request):
    """Masks come out as 1-bit PNG images that hold what the run wrote, beside the boxes, and nothing where there is none."""
    found = request.getfixturevalue(which)
    annotations = load_annotations(found.folder)
    joined = join_annotations(kind(world(len(annotations))), annotations)
    rows = list(joined)
    for row, annotation in zip(rows, annotations, strict=True):
        for instance, annotated in zip(row["instances"], annotation["instances"], strict=True):
            for name in ("chosen", "rejected"):
                mask, rle = instance[f"{name}_mask"], annotated[f"{name}_mask"]
                assert instance[f"{name}_box"] == annotated[f"{name}_box"]
                if rle is None:
                    assert which == "half" and name == "rejected" and mask is None
                else:
                    assert (mask.mode, mask.format) == ("1", "PNG")
                    assert (np.asarray(mask) == decode_rle(rle)).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_masks_survive_files(half, suffix, tmp_path):
    """Annotations that were saved as any kind of file give the same masks."""
    annotations = load_annotations(half.folder)
    save_annotations(annotations, tmp_path / f"annotations{suffix}")
    loaded = load_annotations(tmp_path / f"annotations{suffix}")
    join = partial(join_annotations, world(4))
    assert same(masks_of(join(loaded)), masks_of(join(annotations)))
    assert "counts" in (tmp_path / "annotations.jsonl").read_text() if suffix == ".jsonl" else True


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_a_joined_dataset_without_images_is_joined_again(half, kind):
    """The rows of a joined dataset without their images are annotations too, and keep their masks."""
    joined = join_annotations(world(4), load_annotations(half.folder))
    again = join_annotations(kind(world(4)), joined.remove_columns(["chosen", "rejected"]))
    assert same(masks_of(again), masks_of(joined))


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_a_mask_that_is_none_is_refused(finished, tmp_path, kind):
    """Run lengths that were changed by hand are refused where the rows are joined, with what is wrong with them."""
    annotations = load_annotations(finished.folder)
    save_annotations(annotations, tmp_path / "annotations.jsonl")
    lines = (tmp_path / "annotations.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["instances"][0]["chosen_mask"]["size"] = [32, 31]
    (tmp_path / "annotations.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]))
    with pytest.raises(ValueError, match="A mask of the annotations cannot be read: .*add up to 1,024 pixels"):
        list(join_annotations(kind(world(10)), load_annotations(tmp_path / "annotations.jsonl")))


def test_a_joined_dataset_is_one_for_training(finished):
    """Nothing is wrong with it for the trainer, and its masks have shapes inside of their boxes."""
    joined = join_annotations(world(10), load_annotations(finished.folder))
    columns = ("prompt", "chosen", "rejected", "instances")
    assert check_dataset(joined, columns, ("chosen", "rejected"), resolution=32)["faults"] == []
    for row in joined:
        for instance in row["instances"]:
            mask = pixels_of(instance["chosen_mask"])
            x_min, y_min, x_max, y_max = instance["chosen_box"]
            assert 0.3 < mask.sum() / ((x_max - x_min) * (y_max - y_min)) < 1.1
            assert mask[int(y_min) : int(np.ceil(y_max)), int(x_min) : int(np.ceil(x_max))].sum() == mask.sum()


# ----- the page -----


def total_length(path: str) -> int:
    """Of all lines of an SVG path of level and upright lines."""
    total = 0
    for line in path.split("M")[1:]:
        start, end = line.replace("H", "|").replace("V", "|").split("|")
        total += abs(int(end) - int(start.split(" ")["V" in line]))
    return total


def test_outlines_are_the_edges_of_masks():
    """The lines of a rectangle are its four sides, and those of any mask are as long as there are unlike neighbours."""
    mask = np.zeros((7, 9), bool)
    mask[2:5, 3:8] = True
    lines = "M3 2H8", "M3 5H8", "M3 2V5", "M8 2V5"
    assert outline(mask) == {"path": "".join(lines), "width": 9, "height": 7}
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 8), (30, 20)):
        mask = rng.random(shape) < 0.5
        framed = np.pad(mask, 1)
        unlike = (framed[1:] != framed[:-1]).sum() + (framed[:, 1:] != framed[:, :-1]).sum()
        assert total_length(outline(mask)["path"]) == unlike


def test_the_outline_of_a_large_mask_is_small():
    """A mask of two megapixels is drawn with at most 256 pixels a side, in its own proportions."""
    mask = np.zeros((1000, 2000), bool)
    mask[250:750, 500:1500] = True
    drawn = outline(mask)
    assert (drawn["width"], drawn["height"]) == (256, 128) and len(drawn["path"]) < 100


def test_the_page_shows_masks(tmp_path, capsys):
    """`--preview` draws an outline for each mask in the colour of its verdict, keeps boxes as dashes, and says what has none."""
    world(3).to_parquet(tmp_path / "pairs.parquet")
    flags = ["--dataset_name", tmp_path / "pairs.parquet", "--vlm", "oracle", "--detector", "oracle", "--preview", 3]
    pages = {}
    for name in ("oracle", None):
        chosen = ["--segmenter", name] if name else []
        assert main([*map(str, ["annotate-instances", *flags, *chosen, "--output_dir", tmp_path / str(name)])]) == 0
        pages[name] = (tmp_path / str(name) / "preview.html").read_text()
    page, plain = pages["oracle"], pages[None]
    outlines = re.findall(r'<svg class="outline (\w+)" viewBox="0 0 32 32"', page)
    boxes = re.findall(r'<div class="box (\w+) masked"', page)
    assert len(outlines) == 12 and outlines == boxes == re.findall(r'<div class="box (\w+)"', plain)
    assert "<svg" not in plain and "outline of a mask" in page and "outline of a mask" not in plain
    assert "<li>masks 12</li><li>without mask 0</li>" in page


def test_the_page_says_what_has_no_mask():
    """An instance without a mask has its whole box, and the reason is beside the pair."""
    rows, columns = prepare_rows(world(1), pair_columns)
    page = preview(make_task(columns, Chosen(), Whole()), rows)
    assert page.count("<svg") == 2 and page.count(' masked"') == 2
    assert "Without a mask: " in page and "in the rejected image (there is no mask)" in page


# ----- the command -----


def test_the_command_goes_on(tmp_path, capsys):
    """`--segmenter oracle` says how many masks there are, goes on in its folder, and starts another beside a run without one."""
    world(4).to_parquet(tmp_path / "pairs.parquet")
    flags = ["--dataset_name", tmp_path / "pairs.parquet", "--vlm", "oracle", "--detector", "oracle"]
    command = [*map(str, ["annotate-instances", *flags, "--output_dir", tmp_path / "out"])]
    assert main(command) == 0 and "mask" not in capsys.readouterr().out
    assert main([*command, "--segmenter", "oracle"]) == 0
    assert "instances 8, " in (said := capsys.readouterr().out) and "masks 16, without mask 0." in said
    files = contents(tmp_path / "out")
    assert main([*command, "--segmenter", "oracle"]) == 0
    assert contents(tmp_path / "out") == files and len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--segmenter", "no/such-model"],
            "'no/such-model' is neither a folder nor a model on the Hub or in its cache",
        ),
        (["--segmenter_revision", "main"], "`--segmenter_revision` is the revision of a segmenter: name it with"),
        (
            ["--segmenter", "oracle", "--segmenter_batch_size", "0"],
            "`--segmenter_batch_size` must be at least 1, got 0",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    """A mistake is said before anything is annotated."""
    world(1).to_parquet(tmp_path / "pairs.parquet")
    base = ["--dataset_name", str(tmp_path / "pairs.parquet"), "--vlm", "oracle", "--detector", "oracle"]
    assert main(["annotate-instances", *base, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
