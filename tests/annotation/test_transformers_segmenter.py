# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Segment Anything models of transformers with tiny random weights as segmenters."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tests import tiny
from tests.annotation import tiny_models
from tests.annotation.test_run import read, world
from tests.annotation.test_segmenter import make_task, pair, stored, thing
from tests.annotation.tiny_segmenters import SEGMENTERS, SIDE, tiny_sam, tiny_sam2
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.annotation.segmenter import Canvas, TransformersSegmenter, canvas_for
from trl_diffusion.segmentation import decode_rle


SHAPES = {"square": (40, 40), "wide": (70, 30), "tall": (33, 90), "large": (150, 110), "the canvas": (SIDE, SIDE)}
BOXES = [[0.1, 0.2, 0.6, 0.7], [0.5, 0.1, 0.9, 0.95], [0.0, 0.0, 1.0, 1.0]]


@pytest.fixture(scope="module", params=SEGMENTERS)
def folder(request, tmp_path_factory) -> Path:
    return SEGMENTERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def segmenter(folder) -> TransformersSegmenter:
    return TransformersSegmenter(str(folder), device="cpu")


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> TransformersSegmenter:
    return TransformersSegmenter(str(tiny_sam(tmp_path_factory.mktemp("sam"))), device="cpu")


def images() -> list:
    return [tiny.image(seed, *size) for seed, size in enumerate(SHAPES.values())]


def test_masks_have_the_size_of_their_image(segmenter):
    """Each box of an image of any shape has a bool mask of that image; masks depend on the box and on the image."""
    queries = [(image, box) for image in images() for box in BOXES]
    masks = segmenter.segment(queries)
    for (image, _), mask in zip(queries, masks, strict=True):
        assert mask.dtype == bool and mask.shape == (image.height, image.width)
    assert any(0 < mask.mean() < 1 for mask in masks)
    boxes_differ = [(masks[start] != masks[start + 1]).any() for start in range(0, len(masks), 3)]
    assert sum(boxes_differ) >= 3
    other = segmenter.segment([(tiny.image(9, *SHAPES["square"]), BOXES[0])])[0]
    assert (other != masks[0]).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_sam_gets_what_its_own_processor_makes(sam, shape):
    """Pixels and boxes are those of transformers' `SamProcessor`, and so is the best of the three masks, in the size of the image."""
    image = tiny.image(3, *SHAPES[shape])
    square = {"height": SIDE, "width": SIDE}
    processor = SamProcessor(SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size=square))
    in_pixels = [
        [box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height] for box in BOXES
    ]
    inputs = processor(image, input_boxes=[in_pixels], return_tensors="pt")
    laid = canvas_for(image, sam.processing["size"])
    assert torch.allclose(sam.pixels(image, laid), inputs["pixel_values"][0].float(), atol=1e-5)
    with torch.inference_mode():
        outputs = sam.model(pixel_values=inputs["pixel_values"].float(), input_boxes=inputs["input_boxes"].float())
    logits = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False, pad_size=square
    )[0]
    for mask, of_box, scores in zip(sam.segment([(image, box) for box in BOXES]), logits, outputs.iou_scores[0]):
        expected = of_box[scores.argmax()]
        certain = expected.abs() > 1e-4 * expected.abs().max()
        assert (torch.from_numpy(mask) == (expected > 0))[certain].all() and certain.float().mean() > 0.99


def test_how_images_are_laid_on_the_square():
    """SAM keeps the shape of an image, and rounds half up; SAM 2 and later stretch it."""
    image = tiny.image(0, 300, 200)
    assert canvas_for(image, {"longest_edge": 1024}) == Canvas(1024, 1024, 683, keeps_shape=True)
    assert canvas_for(image.transpose(2), {"longest_edge": 64}) == Canvas(64, 43, 64, keeps_shape=True)
    assert canvas_for(image, {"height": 1024, "width": 1024}) == Canvas(1024, 1024, 1024, keeps_shape=False)


def test_the_best_mask_counts(tmp_path, monkeypatch):
    """Of three masks the one with the highest predicted IoU is taken, for each box by itself."""
    found = TransformersSegmenter(str(tiny_sam2(tmp_path)), device="cpu")
    logits = torch.full((1, 3, 3, 16, 16), -1.0)
    for box, best in enumerate((2, 0, 1)):
        logits[0, box, best, :, : 4 * (box + 1)] = 1.0
    scores = torch.tensor([[[0.1, 0.2, 0.9], [0.9, 0.2, 0.1], [0.3, 0.31, 0.1]]])

    def forward(pixel_values, input_boxes):
        assert pixel_values.shape == (1, 3, SIDE, SIDE)
        assert torch.allclose(input_boxes[0], SIDE * torch.tensor(BOXES))
        return type("Outputs", (), {"pred_masks": logits, "iou_scores": scores})

    monkeypatch.setattr(found.model, "forward", forward)
    image = tiny.image(0, 32, 20)
    masks = found.segment([(image, box) for box in BOXES])
    assert [mask[0].sum() for mask in masks] == [8, 16, 24] and all((mask == mask[0]).all() for mask in masks)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_masks_do_not_depend_on_their_neighbours(folder, segmenter, batch_size):
    """Any batch size and any order of the queries gives the masks of each image alone, but where the model is undecided."""
    queries = [(image, box) for number, image in enumerate(images()) for box in BOXES[: 1 + number % 3]]
    alone = [segmenter.segment([query])[0] for query in queries]
    order = np.random.default_rng(0).permutation(len(queries))
    together = TransformersSegmenter(str(folder), batch_size=batch_size, device="cpu").segment(
        [queries[i] for i in order]
    )
    for place, mask in zip(order, together, strict=True):
        assert (mask != alone[place]).mean() < 0.002


@pytest.mark.parametrize("batch_size, forwards", [(1, 4), (2, 2), (4, 2)])
def test_an_image_is_encoded_once(folder, batch_size, forwards):
    """Two pairs with five and two instances are four images, and are encoded once each, whatever the number of boxes."""
    found = TransformersSegmenter(str(folder), batch_size=batch_size, device="cpu")
    encoded = []
    encoder = found.model.vision_encoder
    encoder.register_forward_hook(lambda _, inputs, output: encoded.append(len(output.last_hidden_state)))
    pairs = []
    for seed, number in enumerate((5, 2)):
        sides = [stored(np.asarray(tiny.image(2 * seed + side, 40, 30))) for side in (0, 1)]
        pairs.append(
            pair(*sides, *(thing(str(index), (0.1 * index, 0.1, 0.1 * index + 0.4, 0.9)) for index in range(number)))
        )
    found(pairs)
    assert sum(encoded) == 4 and len(encoded) == forwards
    for record, number in zip(pairs, (5, 2), strict=True):
        masks = sum(
            mask is not None for found in record.instances for mask in (found.chosen_mask, found.rejected_mask)
        )
        assert masks + len(record.without_mask) == 2 * number


def test_it_travels_without_its_model(segmenter):
    """A pickled segmenter has no weights, and gives the same masks after it has loaded them again."""
    query = [(tiny.image(0, 40, 30), BOXES[0])]
    before = segmenter.segment(query)[0]
    content = pickle.dumps(segmenter)
    assert len(content) < 2000
    assert (pickle.loads(content).segment(query)[0] == before).all()


def test_half_precision(folder):
    """In bfloat16 the model takes its own type and gives masks of the image."""
    found = TransformersSegmenter(str(folder), dtype="bfloat16", device="cpu")
    (mask,) = found.segment([(tiny.image(0, 40, 30), BOXES[0])])
    assert mask.shape == (30, 40) and mask.dtype == bool and found.model.dtype == torch.bfloat16
    assert found.describe() == {"model": str(folder), "revision": found.revision, "dtype": "bfloat16"}


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    """A model without all of its weights would have random ones: it is refused with the name of one."""
    file = tiny_sam2(tmp_path) / "model.safetensors"
    weights = load_file(file)
    lost = [name for name in weights if name.startswith("mask_decoder.iou_prediction_head")]
    save_file({name: weight for name, weight in weights.items() if name not in lost}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"lacks {len(lost)} of the weights of Sam2Model, such as mask_decoder.iou_pred"
    ):
        TransformersSegmenter(str(tmp_path), device="cpu").segment([(tiny.image(0), BOXES[0])])


def test_a_model_of_another_kind_is_refused(tmp_path):
    """A detector is no segmenter."""
    tiny_models.tiny_owl(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForMaskGeneration"):
        TransformersSegmenter(str(tmp_path), device="cpu").segment([(tiny.image(0), BOXES[0])])


def test_what_it_is_made_with():
    """A batch has an image at least, and a model that is nowhere is refused before a run."""
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        TransformersSegmenter("anything", batch_size=0)
    with pytest.raises(ValueError, match="'no/such-model' is neither a folder nor a model"):
        TransformersSegmenter("no/such-model")


def test_a_run_with_it(folder, tmp_path):
    """In a whole run every instance has a mask of the size of its file in each image, or a reason why it has none."""
    rows, columns = prepare_rows(world(3), pair_columns)
    task = make_task(columns, TransformersSegmenter(str(folder), device="cpu"))
    finished = run(rows, task, tmp_path, run_locally, disable_tqdm=True)
    counts = finished.counts
    assert counts["ok"] == 3 and counts["masks"] + counts["without_mask"] == 12
    masks = [
        found[name]
        for row in read(finished.folder)
        for found in row["instances"]
        for name in ("chosen_mask", "rejected_mask")
    ]
    assert all(mask["size"] == [32, 32] and decode_rle(mask).any() for mask in masks if mask)
    lacking = [lack for row in read(finished.folder) for lack in row["without_mask"]]
    assert sum(mask is None for mask in masks) == len(lacking) == counts["without_mask"]
    assert all(lack["reason"] for lack in lacking)
