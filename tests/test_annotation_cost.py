# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
from PIL import Image
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SwinConfig,
)

from tests.benchmark.annotation_cost import (
    GPU,
    Inputs,
    Stage,
    feeding,
    grounding_dino,
    num_parameters,
    on_gpu,
    painting_requests,
    painting_stages,
    pair_requests,
    pair_stages,
    patch_grid,
    qwen,
    request_flops,
    request_tokens,
    vision_flops,
    visual_tokens,
    without_values,
)
from trl_diffusion.annotation.planner import Plan
from trl_diffusion.annotation.vlm import Request


INPUTS = Inputs(pairs=100, instances=130, paintings=10)
GPU_OF_ONE_TERA = GPU("test", bfloat16=1e12, float32=1e11, bandwidth=1e9)


@pytest.fixture(scope="module")
def vlm() -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of each tower, one with windows, three of which make a crop's side."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    )
    return without_values(lambda: Qwen2_5_VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def detector() -> GroundingDinoForObjectDetection:
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
    )
    return without_values(lambda: GroundingDinoForObjectDetection(config))


@pytest.fixture(scope="module")
def stages(vlm, detector) -> dict[str, Stage]:
    return {stage.role: stage for stage in pair_stages(vlm, detector, INPUTS)}


def hand_counted_prefill(vlm: Qwen2_5_VLForConditionalGeneration, length: int) -> int:
    """2 x weights x tokens in the layers, 4 x tokens^2 x width in each attention, one row of logits."""
    config = vlm.config.text_config
    weights = sum(
        parameter.numel() for parameter in vlm.model.language_model.layers.parameters() if parameter.ndim == 2
    )
    attention = config.num_hidden_layers * 4 * length**2 * config.hidden_size
    return 2 * weights * length + attention + 2 * config.hidden_size * config.vocab_size


def test_the_models_have_their_true_sizes():
    """What is counted at full size has as many parameters as the published checkpoints: 8.29 billion and 233 million."""
    assert num_parameters(qwen()) == pytest.approx(8.29e9, rel=0.001)
    assert num_parameters(grounding_dino()) == pytest.approx(233e6, rel=0.01)


def test_a_request_costs_what_its_products_sum_up_to(vlm):
    """What is counted on the real modules is the closed form of a transformer: prefill, one step, vision with its windows."""
    request = Request("x" * 400, (Image.new("RGB", (336, 336)),), Plan)
    length = 19 + 2 + 144 + 100
    assert request_tokens(request, 4.0) == length
    found = request_flops(vlm, request, answer_tokens=4, characters_a_token=4.0)
    assert found["prefill"] == hand_counted_prefill(vlm, length)
    # A step is a prefill of one token whose attention sees all that came before, and itself
    attention = vlm.config.text_config.num_hidden_layers * 4 * vlm.config.text_config.hidden_size
    assert found["answer"] == 3 * (hand_counted_prefill(vlm, 1) + attention * length)
    # 24 x 24 patches in windows of 8 x 8: nine of them in the first block, one in the second
    visual = vlm.model.visual
    weights = sum(p.numel() for p in (*visual.patch_embed.parameters(), *visual.blocks.parameters()) if p.ndim > 1)
    merger = sum(p.numel() for p in visual.merger.parameters() if p.ndim > 1)
    attention = 4 * 16 * (9 * 64**2 + 576**2)
    assert found["vision"] == vision_flops(vlm, 336, 336) == 2 * weights * 576 + 2 * merger * 144 + attention


def test_an_image_is_seen_as_one_token_for_28_by_28_pixels():
    """Sides are rounded to multiples of 28: 512 is 18 tokens, 336 is 12, and a 1024 limited to 1280 x 28 x 28 pixels 36."""
    assert [visual_tokens(side, side) for side in (512, 336, 1001)] == [18**2, 12**2, 36**2]
    assert patch_grid(width=280, height=560) == (40, 20)
    assert painting_requests(INPUTS)[0].images[0].size == (1001, 1001)


def test_the_cost_is_linear_in_pairs(vlm, detector, stages):
    """Twice the pairs, instances and paintings cost twice as much in each role, and one costs what it did."""
    twice = replace(INPUTS, pairs=200, instances=260, paintings=20)
    for stage in pair_stages(vlm, detector, twice):
        assert stage.flops == stages[stage.role].flops
        assert stage.total_flops == 2 * stages[stage.role].total_flops
    (before,), (after,) = painting_stages(vlm, INPUTS), painting_stages(vlm, twice)
    assert after.total_flops == 2 * before.total_flops


def test_each_role_runs_as_often_as_the_pipeline_asks_it(stages):
    """The planner once a pair, the detector once an image and planned label, the judge in both orders, the expert by dimension."""
    assert stages["planner"].runs == 100
    assert stages["detector"].runs == 100 * 2 * 1.5
    assert stages["judge"].runs == 2 * 130
    assert len(painting_requests(INPUTS)) == 7


def test_both_orders_double_the_judge(vlm, stages):
    """The judge costs twice one of its requests for each instance, and both orders cost the same."""
    _, (first, swapped) = pair_requests(INPUTS)
    one, other = (request_flops(vlm, request, INPUTS.judge_answer, 4.0) for request in (first, swapped))
    assert one == other
    assert stages["judge"].total_flops == 2 * 130 * sum(one.values())


def test_more_visual_tokens_cost_more(vlm, detector, stages):
    """Larger images cost the planner more, larger crops the judge, and neither costs another role more."""

    def dearer(**changes) -> list[str]:
        found = pair_stages(vlm, detector, replace(INPUTS, **changes))
        assert all(stage.total_flops >= stages[stage.role].total_flops for stage in found)
        return [stage.role for stage in found if stage.total_flops > stages[stage.role].total_flops]

    assert dearer(image_size=768) == ["planner"]  # the detector's images all have shorter sides of 800
    assert dearer(crop_size=448) == ["judge"]
    assert dearer(prompt_characters=200) == ["planner"]
    assert dearer(planned_labels=3.0) == ["detector"]


def test_hours_are_operations_over_what_a_gpu_does(vlm):
    """3600e12 operations at half of a peak of 1e12 a second take two hours, the detector in float32 ten times as long."""
    inputs = replace(INPUTS, utilization=0.5, prepared_pairs_per_second=200.0, dataset_gigabytes=0.1)
    stages = [
        Stage("planner", 100, {"prefill": 30e12, "answer": 6e12}, answer_steps=8),
        Stage("detector", 300, {"forward": 6e12}, answer_steps=0),
    ]
    found = on_gpu(GPU_OF_ONE_TERA, stages, 100, vlm, inputs)
    assert found["hours"] == {"planner": 2.0, "detector": 1.0}
    assert found["total_hours"] == 3.0
    assert found["detector_hours_float32"] == pytest.approx(10.0)
    assert found["total_hours_detector_float32"] == pytest.approx(12.0)
    # 100 requests of 8 steps, 8 of them at once: 100 readings, two bytes a weight
    weights = num_parameters(vlm.model.language_model.layers) + num_parameters(vlm.lm_head)
    assert found["hours_reading_weights_for_answers"] == pytest.approx(100 * 2 * weights / 1e9 / 3600)
    fed = feeding(found, inputs)
    assert fed["pairs_per_second"] == pytest.approx(100 / (3 * 3600))
    assert fed["gpus_fed"] == pytest.approx(200 * 3 * 3600 / 100)
    assert fed["cores_per_gpu"] * fed["gpus_fed"] == pytest.approx(2)
    assert fed["megabytes_per_second"] == pytest.approx(100 / (3 * 3600))  # a tenth of a gigabyte, a megabyte a pair


def test_inputs_that_contradict_one_another_are_refused():
    """Numbers that are not positive, and fewer planned labels than kept instances, are errors that name the option."""
    with pytest.raises(ValueError, match="utilization"):
        Inputs(utilization=0.0)
    with pytest.raises(ValueError, match="Raise `planned_labels`"):
        Inputs(planned_labels=1.2)
