# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The evaluation in a card: its tables, what it says of the arm, and `model-index`."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markdown_it import MarkdownIt

from trl_diffusion.cards.facts import DataFacts, EvaluationFacts, ModelFacts, Score
from trl_diffusion.cards.results import eval_results, evaluation_section


PICKSCORE = {"label": "PickScore", "higher_is_better": True, "weights": {"org/pick": "abc"}, "full_names": []}
NEGATIVES = {"label": "#A_neg", "higher_is_better": False, "weights": {}, "full_names": []}
FID = {"label": "FID", "higher_is_better": False, "weights": {"org/fid": "def"}, "full_names": ["fid_x_n60"]}


def model(trainer="InstanceDPOTrainer", w_neg=0.0, data="user/pairs", **further) -> ModelFacts:
    return ModelFacts(
        name="mine", trainer=trainer, method="IAPO", unit="pairs", tags=[], paper={}, pipeline_class="StableDiffusionPipeline",
        resolution=32, loading_arguments="", call_arguments="", example_prompt="a cat", script="instance-dpo", is_lora=True,
        is_flow=False, data=DataFacts(data), hyperparameters={"w_neg": w_neg}, **further,
    )  # fmt: skip


def facts(**changed) -> EvaluationFacts:
    """Three models: the base, the arm and the card's."""
    known = EvaluationFacts(
        model="iapo",
        models={"base": "the base", "dpo": "another LoRA", "iapo": "LoRA"},
        arm="dpo",
        metrics={"pickscore": PICKSCORE, "num_negative_attributes": NEGATIVES},
        scores={
            "base": {"pickscore": Score(21.004, 20.5, 21.5, 60), "num_negative_attributes": Score(0.5, 0.25, 0.75, 60)},
            "dpo": {"pickscore": Score(22.0, 21.5, 22.5, 60), "num_negative_attributes": Score(0.25, 0.0, 0.5, 60)},
            "iapo": {"pickscore": Score(22.001, 21.5, 22.5, 57, 3), "num_negative_attributes": Score(0.75, None, None, 60)},
        },
        win_rates={
            "dpo": {"pickscore": Score(0.6, 0.5, 0.7, 60), "num_negative_attributes": Score(0.25, 0.2, 0.3, 60)},
            "iapo": {"pickscore": Score(0.75, 0.7, 0.8, 57, 3), "num_negative_attributes": Score(0.25, 0.2, 0.3, 60)},
        },
        prompts={
            "source": "parti", "dataset": "nateraw/parti-prompts", "revision": "c0ffee", "digest": "sha256:1", "number": 60,
            "images": {"base": 60, "dpo": 60, "iapo": 60},
        },
        protocol={"name": "iapo_sd15", "num_inference_steps": 50, "scheduler": None, "source": "", "unknown": ["seed"]},
        versions={"torch": "2.6"},
        base="base",
        needed_arm="w_neg=1",
        arm_differences={},
    )  # fmt: skip
    return replace(known, **changed)


def tables(section: str) -> list[list[list[str]]]:
    """The cells of each table, as a reader of Markdown sees them."""
    found, cells = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(section):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            cells = found[-1][-1]
        elif token.type in ("th_close", "td_close"):
            cells = None
        elif token.type == "inline" and cells is not None:
            bold = any(child.type == "strong_open" for child in token.children)
            cells.append("".join(child.content for child in token.children) + ("!" if bold else ""))
    return found


def test_the_tables():
    """
    Figures with intervals; the best of each column is bold, and both of two that are shown alike; what has no interval has none; what
    is missing is counted.
    """
    scores, rates = tables(evaluation_section(facts(), model()))
    assert scores == [
        ["Model", "PickScore ↑", "#A_neg ↓"],
        ["base", "21.00 [20.50, 21.50]", "0.5000 [0.2500, 0.7500]"],
        ["dpo (w_neg=1 arm)", "22.00 [21.50, 22.50]!", "0.2500 [0.0000, 0.5000]!"],
        ["iapo (this model)", "22.00 [21.50, 22.50] (57/60)!", "0.7500"],
    ]
    assert rates == [
        ["Model", "PickScore", "#A_neg"],
        ["dpo (w_neg=1 arm)", "60.0 [50.0, 70.0]", "25.0 [20.0, 30.0]!"],
        ["iapo (this model)", "75.0 [70.0, 80.0] (57/60)!", "25.0 [20.0, 30.0]!"],
    ]


def test_what_is_said_beside_the_tables():
    """Numbers of prompts and images, the baseline, the revision, sampling, weights, what was left out."""
    section = evaluation_section(facts(), model())
    for text in (
        "over 60 prompts and 60 images per model, with 95 % intervals over prompts",
        "better than that of base for the same prompt",
        "- **base** (the baseline of the win rates): the base",
        "dataset nateraw/parti", "`c0ffee`", "`sha256:1`", "org/pick (abc)", "no weights", "no public source confirms seed",
        "PickScore of iapo: 3 of 60 images without a score.",
        "Win rate of iapo by PickScore: 3 of 60 pairs without both scores.",
        "Student's t", "torch 2.6",
    ):  # fmt: skip
        assert text in section.replace("\\", ""), text
    assert re.findall(r"^(#+) ", section, re.MULTILINE) == ["###"] * 4
    assert "scheduler" not in section and "None" not in section
    whole = facts(
        scores={"base": {"pickscore": Score(1.0, 0.5, 1.5, 60)}}, win_rates={}, models={"base": ""}, model="base", arm=None,
        metrics={"pickscore": PICKSCORE},
    )  # fmt: skip
    section = evaluation_section(whole, None)
    assert "nothing, every image has every score" in section and "Win rates" not in section
    assert tables(section) == [[["Model", "PickScore ↑"], ["base (this model)", "1.000 [0.500, 1.500]"]]]


def test_scores_of_all_images():
    """FID has no interval, which is said; values for other numbers of images are not compared."""
    scores = {
        name: {"fid": Score(value, number=60)} for name, value in (("base", 12.34), ("dpo", 1.5), ("iapo", None))
    }
    known = facts(metrics={"fid": FID}, scores=scores, win_rates={})
    section = evaluation_section(known, model())
    assert [row[1] for row in tables(section)[0]] == ["FID ↓", "12.3", "1.5!", "n/a"]
    assert "FID has no interval: all images are scored together." in section and "FID of iapo has no value." in section
    other = facts(metrics={"fid": FID | {"full_names": ["fid_x_n60", "fid_x_n30"]}}, scores=scores, win_rates={})
    section = evaluation_section(other, model())
    assert [row[1] for row in tables(section)[0]] == ["FID ↓", "12.3", "1.5", "n/a"]
    assert "fid_x_n60, fid_x_n30 are not comparable" in section.replace("\\", "")


# ---- The arm ----


NO_W_NEG = "what the mask adds was not measured"
NO_SFT = "what the contrast adds was not measured"


@pytest.mark.parametrize(
    "changed, trained, expected",
    [
        ({}, model(), "the difference between the two is what the mask adds."),
        ({}, model(data=None), "The data is not on the Hub, so only its number of rows was compared."),
        (
            {"arm_differences": {"learning_rate": [3e-4, 1e-4], "lora_r": [8, None]}}, model(),
            "A `w_neg=1` arm with other settings: dpo was trained with `w_neg=1`, which is plain Diffusion-DPO, but differs in more "
            "(`learning_rate`: `0.0003`, here `0.0001`; `lora_r`: `8`, here `not given`), so the difference to it is not only what "
            "the mask adds.",
        ),
        ({"arm_differences": None}, model(), "how far its recipe is that of this model is not recorded"),
        ({"arm": None, "arm_differences": None}, model(), NO_W_NEG),
        ({"arm": None, "arm_differences": None}, None, NO_W_NEG),
        ({"arm": None, "arm_differences": None, "needed_arm": None}, model(), NO_W_NEG),
        ({"arm": None, "arm_differences": None, "needed_arm": "SFT"}, model("ComplexPOTrainer"), NO_SFT),
        ({"arm": None, "arm_differences": None, "needed_arm": None}, model("ComplexPOTrainer"), NO_SFT),
        ({"needed_arm": "SFT"}, model("ComplexPOTrainer"), "was fine-tuned on the images (SFT), with otherwise the same recipe"),
        ({"base": "dpo", "arm": None, "needed_arm": None}, None, "- **dpo** (base): another LoRA"),
        ({"base": None}, model(), "The base model is not known to be among the compared models."),
    ],
)  # fmt: skip
def test_what_the_arm_is(changed, trained, expected):
    """The same recipe; other settings; not known; none: each is a sentence."""
    section = evaluation_section(facts(**changed), trained)
    assert expected in section.replace("\\", "")
    assert (NO_W_NEG in section) == (expected == NO_W_NEG) and (NO_SFT in section) == (expected == NO_SFT)


@pytest.mark.parametrize("trained", [model(w_neg=1.0), model("AttributeSFTTrainer"), None])
def test_models_without_an_arm(trained):
    """The arms themselves, and what is not known to need one."""
    section = evaluation_section(facts(arm=None, arm_differences=None, needed_arm=None), trained)
    assert "not measured" not in section and " arm" not in section


def test_scores_during_training_are_no_evaluation():
    """What a callback logs is in neither the section nor the metadata, and changes nothing."""
    logs = {"eval_pickscore": 99.5, "eval_pickscore_win_rate": 0.875}
    assert evaluation_section(facts(), model(last_logs=logs)) == evaluation_section(facts(), model())
    assert not [result for result in eval_results(facts(), "mine") if result.metric_value in logs.values()]


# ---- model-index ----


def test_model_index():
    """Values with their intervals, the model's first; the arm's have names and types of their own."""
    results = eval_results(facts(), "mine")
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in results] == [
        ("pickscore", "PickScore", 22.001),
        ("num_negative_attributes", "#A_neg", 0.75),
        ("win_rate_pickscore", "Win rate by PickScore against base", 0.75),
        ("win_rate_num_negative_attributes", "Win rate by #A_neg against base", 0.25),
        ("pickscore_of_arm", "PickScore (w_neg=1 arm, not mine)", 22.0),
        ("num_negative_attributes_of_arm", "#A_neg (w_neg=1 arm, not mine)", 0.25),
        ("win_rate_pickscore_of_arm", "Win rate by PickScore against base (w_neg=1 arm, not mine)", 0.6),
        ("win_rate_num_negative_attributes_of_arm", "Win rate by #A_neg against base (w_neg=1 arm, not mine)", 0.25),
    ]
    assert results[0].metric_args == {"number": 57, "lower": 21.5, "upper": 22.5, "confidence": 0.95}
    assert results[1].metric_args == {"number": 60}
    first = results[0]
    assert (first.task_type, first.dataset_type, first.dataset_name) == (
        "text-to-image",
        "nateraw/parti-prompts",
        "parti",
    )
    assert (first.dataset_revision, first.dataset_args) == ("c0ffee", {"number": 60, "digest": "sha256:1"})
    assert {result.verified for result in results} == {None}


def test_missing_values_are_left_out():
    """`model-index` has no nulls."""
    scores = {name: {"pickscore": Score(None, number=0, missing=60)} for name in ("base", "dpo", "iapo")}
    known = facts(metrics={"pickscore": PICKSCORE}, scores=scores, win_rates={"iapo": {"pickscore": Score(None)}})
    assert eval_results(known, "mine") == []


HOSTILE = "<script>|`x`**b** [a](http://x) $y$ @all\n---\n- {{ z }} #1: !!python/object"


def test_model_index_comes_back():
    """Written as a card and read again by `huggingface_hub`, also with hostile names: the same results, in plain YAML."""
    for known, name in ((facts(), "mine"), (hostile(), HOSTILE)):
        results = eval_results(known, name)
        data = ModelCardData(model_name=name, eval_results=results, base_model="user/base")
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n# x\n")
        assert card.data.eval_results == results and card.data.model_name == name
        (entry,) = yaml.safe_load(data.to_yaml())["model-index"]
        (result,) = entry["results"]
        check_schema(entry, result)
        assert ModelCard(str(card)).data.eval_results == results


def check_schema(entry: dict, result: dict) -> None:
    """The specification of `model-index` in the Hub's `modelcard.md`: these keys, all values scalars but for `args`."""
    assert set(entry) == {"name", "results"} and set(result) == {"task", "dataset", "metrics"}
    assert set(result["task"]) == {"type", "name"} and {"type", "name"} <= set(result["dataset"])
    assert set(result["dataset"]) <= {"type", "name", "config", "split", "revision", "args"}
    for metric in result["metrics"]:
        assert {"type", "value", "name"} <= set(metric) <= {"type", "value", "name", "config", "args"}
        assert type(metric["value"]) is float and type(metric["type"]) is type(metric["name"]) is str


def hostile() -> EvaluationFacts:
    """Every text of others is one that would break a card."""
    names = {"base": HOSTILE, "dpo": f"{HOSTILE} dpo", "iapo": f"{HOSTILE} iapo"}
    known = facts()
    return facts(
        model=names["iapo"],
        arm=names["dpo"],
        base=names["base"],
        models=dict.fromkeys(names.values(), HOSTILE),
        scores={names[name]: scores for name, scores in known.scores.items()},
        win_rates={names[name]: rates for name, rates in known.win_rates.items()},
        metrics={
            name: metric | {"label": HOSTILE, "weights": {HOSTILE: HOSTILE}} for name, metric in known.metrics.items()
        },
        prompts=known.prompts
        | {"source": HOSTILE, "dataset": HOSTILE, "split": HOSTILE, "revision": HOSTILE, "digest": HOSTILE},
        protocol={HOSTILE: HOSTILE, "unknown": [HOSTILE]},
        versions={HOSTILE: HOSTILE},
        arm_differences={HOSTILE: [HOSTILE, HOSTILE]},
    )


def test_hostile_names_break_nothing():
    """The page has the same headings, tables and lists as with harmless names, and neither HTML, links nor code of theirs."""
    section = evaluation_section(hostile(), model())
    harmless = evaluation_section(facts(arm_differences={"x": [1, 2]}), model())

    def outline(text: str) -> list[str]:
        return [token.type for token in MarkdownIt("commonmark").enable("table").parse(text)]

    assert outline(section) == outline(harmless)
    tokens = [
        child.type
        for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(section)
        for child in token.children or []
    ]
    assert not {"html_inline", "link_open", "image"} & set(tokens)
    (scores, rates) = tables(section)
    assert [len(row) for row in scores] == [3] * 4 and scores[3][0].startswith("<script>|`x`**b** [a](http://x)")


def test_results_are_of_the_library():
    """Plain objects of `huggingface_hub`."""
    assert {type(result) for result in eval_results(facts(), "mine")} == {EvalResult}
