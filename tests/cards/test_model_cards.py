# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card: its metadata is what was given, its code runs, and nobody's name or prompt is anything but text in it."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

import trl_diffusion
from tests.cards.test_text import HOSTILE, INVISIBLE
from tests.hub.card_rules import check_card
from trl_diffusion.cards import model
from trl_diffusion.cards.facts import DataFacts, EvaluationFacts, ModelFacts, Sample, read_model_facts, write_facts
from trl_diffusion.cards.licenses import LICENSES, license_of
from trl_diffusion.cards.methods import CITATIONS, METHODS, PAIR_LOSSES
from trl_diffusion.cards.text import is_hub_id, plain


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
EVALUATION = EvaluationFacts("sdxl-iapo", {"base": SDXL, "sdxl-iapo": "a LoRA"}, None, {}, {}, {}, {}, {})


def facts(**changes) -> ModelFacts:
    """Those of a LoRA on SDXL by IAPO, with everything that a card can say."""
    known = ModelFacts(
        name="sdxl-iapo",
        model_id="user/sdxl-iapo",
        trainer="InstanceDPOTrainer",
        method="IAPO",
        unit="pairs",
        tags=["trl-diffusion", "iapo", "diffusion-dpo"],
        paper={"title": "Instance-Aware Preference Optimization", "venue": "CVPR 2026", "citation": "@inproceedings{sun2026iapo,\n}"},
        base=SDXL,
        base_revision="0123456789abcdef0123456789abcdef01234567",
        pipeline_class="StableDiffusionXLPipeline",
        is_flow=False,
        is_lora=True,
        is_exported=True,
        resolution=1024,
        loading_arguments="dtype=torch.float16",
        call_arguments="height=1024, width=1024",
        example_prompt="a red bicycle",
        data=DataFacts("user/pickapic-instance", "default", "train", "abcdef0123456789", "mit", 51000),
        samples=[Sample("a red bicycle", "images/sample-0.png", "images/sample-0-base.png")],
        teaser="images/teaser.png",
        curves="images/curves.png",
        masks="images/masks.png",
        hyperparameters={"beta": 5000.0, "w_neg": 0.0, "`unet` while training": "held in 4 bits", "optimizer steps": 200},
        recipe={"model_name_or_path": SDXL, "dataset_name": "user/pickapic-instance", "beta": 5000.0, "learning_rate": 1e-5},
        command="trl-diffusion instance-dpo --config iapo_sdxl.yaml",
        script="instance-dpo",
        last_logs={"loss": 0.6123456, "rewards/margins": -0.25},
        trackers={"wandb": "https://wandb.ai/me/p/runs/1", "trackio": "https://huggingface.co/spaces/me/t", "comet": "https://www.comet.com/x"},
        hardware="8 x NVIDIA H100",
        seconds=3725.4,
        versions={"trl-diffusion": "0.1.0", "diffusers": "0.42.1"},
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


@pytest.fixture(autouse=True)
def evaluation_results(monkeypatch):
    """The evaluation's own parts have their own tests."""
    result = EvalResult("text-to-image", "parti", "Parti", "pickscore", 21.5)
    monkeypatch.setattr(model, "evaluation_section", lambda evaluation, known: "### Scores\n\nA table.\n")
    monkeypatch.setattr(model, "eval_results", lambda evaluation, name: [result])


markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def parsed(card: ModelCard) -> list:
    """All tokens, inline ones too."""
    return [each for token in markdown.parse(card.text) for each in (token, *(token.children or []))]


def structure(card: ModelCard) -> list:
    """What of a card is not text: kinds of tokens, the targets of links and pictures, HTML, and the languages of blocks of code."""
    return [
        (
            token.type,
            token.attrs.get("href"),
            token.attrs.get("src"),
            token.info,
            token.content if "html" in token.type else "",
        )
        for token in parsed(card)
        if token.type not in ("text", "softbreak", "code_inline")
    ]


def headings(card: ModelCard) -> list[str]:
    tokens = markdown.parse(card.text)
    return [
        f"{token.markup} {tokens[at + 1].content}" for at, token in enumerate(tokens) if token.type == "heading_open"
    ]


def blocks(card: ModelCard, language: str) -> list[str]:
    return [token.content for token in markdown.parse(card.text) if token.type == "fence" and token.info == language]


def test_the_metadata():
    """What the Hub reads, field by field, and the same when the card is read again."""
    card = model.model_card(facts(), EVALUATION)
    expected = {
        "base_model": SDXL,
        "base_model_relation": "adapter",
        "datasets": ["user/pickapic-instance"],
        "language": "en",
        "library_name": "diffusers",
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "tags": [
            *("diffusers", "diffusers-training", "diffusion-dpo", "iapo", "lora", "stable-diffusion-xl"),
            *("stable-diffusion-xl-diffusers", "template:sd-lora", "text-to-image", "trl-diffusion"),
        ],
        "widget": [{"text": "a red bicycle", "output": {"url": "images/sample-0.png"}}],
        "model-index": [
            {
                "name": "sdxl-iapo",
                "results": [
                    {
                        "task": {"type": "text-to-image"},
                        "dataset": {"name": "Parti", "type": "parti"},
                        "metrics": [{"type": "pickscore", "value": 21.5}],
                    }
                ],
            }
        ],
    }
    assert card.data.to_dict() == expected
    assert ModelCard(str(card)).data.to_dict() == expected and str(ModelCard(str(card))) == str(card)
    assert "model-index" not in model.model_card(facts()).data.to_dict()


def test_what_a_card_has():
    """Its headings in their order, each with something below it; pictures, badges, numbers, the command and the recipe."""
    card = model.model_card(facts(), EVALUATION)
    assert headings(card) == [
        *("# sdxl-iapo", "## How to use it", "## Download", "## How it was trained", "### What was logged"),
        *("### Masks", "## Evaluation", "### Scores", "## Limits and biases", "## Licence", "## Framework versions", "## Citations"),
    ]  # fmt: skip
    text = card.text
    assert "<Gallery />" in text
    pictures = [token.attrs["src"] for token in parsed(card) if token.type == "image"]
    names = ("teaser", "curves", "masks")
    assert pictures == [f"images/{name}.png" for name in names]
    for url in facts().trackers.values():
        assert f"]({url})" in text
    assert len(re.findall('<img src="https://raw[^"]*" alt="Visualize in [^"]*" width="150" height="24"/>', text)) == 3
    for said in (
        "with IAPO (Instance-Aware Preference Optimization, CVPR 2026)",
        "https://huggingface.co/datasets/user/pickapic-instance/tree/abcdef0123456789",
        f"https://huggingface.co/{SDXL}/tree/0123456789abcdef0123456789abcdef01234567",
        "split `train`",
        "51000 pairs",
        "Trained on 8 x NVIDIA H100 in 1:02:05",
        "| beta | 5000.0 |",
        "| `unet` while training | held in 4 bits |",
        "| loss | 0.6123 |",
        "| rewards/margins | -0.25 |",
        "[`comfyui/sdxl-iapo.safetensors`](comfyui/sdxl-iapo.safetensors)",
        "trl-diffusion export-lora user/sdxl-iapo --output lora.safetensors",
        "CreativeML OpenRAIL++-M",
        "The data declares `mit`",
        "- diffusers 0.42.1",
        "Pick-a-Pic",
        "trained at 1024 pixels",
    ):
        assert said in text, said
    assert blocks(card, "bash") == ["trl-diffusion instance-dpo --config iapo_sdxl.yaml\n"]
    assert [yaml.safe_load(block) for block in blocks(card, "yaml")] == [facts().recipe]
    assert "run `trl-diffusion instance-dpo --config training.yaml`." in text
    assert "\n\n\n" not in text


def test_a_card_of_little_says_little():
    """What is not known is not said, without empty headings; that nothing was measured is said, with the command."""
    little = facts(
        base=None, base_revision=None, data=DataFacts(), samples=[], teaser=None, curves=None, masks=None, recipe={}, command=None,
        last_logs={}, trackers={}, hardware=None, seconds=None, is_exported=False,
    )  # fmt: skip
    card = model.model_card(little)
    assert headings(card) == [
        *("# sdxl-iapo", "## How to use it", "## Download", "## How it was trained", "## Evaluation"),
        *("## Limits and biases", "## Licence", "## Framework versions", "## Citations"),
    ]
    assert not [token for token in parsed(card) if token.type == "image" or "html" in token.type]
    data = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "widget"} & data.keys()
    assert "Nothing was measured with this model" in card.text and "`w_neg` 1, which is Diffusion-DPO" in card.text
    assert "- Data: not published." in card.text and "None" not in card.text
    assert "The licence of the base holds for this model too, and must be looked up." in card.text
    assert "comfyui" not in card.text.lower() and "Pick-a-Pic" not in card.text


@pytest.mark.parametrize("is_lora", [True, False])
def test_no_section_is_empty(is_lora):
    """Whatever is missing: between two headings of one level there is text."""
    empty = {
        "samples": [],
        "teaser": None,
        "curves": None,
        "masks": None,
        "recipe": {},
        "command": None,
        "last_logs": {},
        "trackers": {},
    }
    for name in empty:
        for given in ({name: empty[name]}, {other: value for other, value in empty.items() if other != name}):
            tokens = markdown.parse(model.model_card(facts(is_lora=is_lora, **given)).text)
            levels = [(at, int(token.tag[1])) for at, token in enumerate(tokens) if token.type == "heading_open"]
            for (at, level), (following, next_level) in zip(levels, levels[1:]):
                assert following - at > 3 or next_level > level


@pytest.mark.parametrize("base", LICENSES)
def test_licences(base):
    """A known base's licence is in the metadata, with a name and an address where the Hub has no name for it."""
    license, card = license_of(base), model.model_card(facts(base=base))
    data = card.data.to_dict()
    assert is_hub_id(base) and data["license"] == license.id
    assert (data.get("license_name"), data.get("license_link")) == (license.name, license.link)
    assert (license.id == "other") == (license.link is not None) == (license.name is not None)


def test_samples_beyond_the_teaser():
    """A table shows base and model for each prompt where the teaser does not show all, or there is none."""
    samples = [Sample(f"prompt {n}", f"images/sample-{n}.png", f"images/sample-{n}-base.png") for n in range(4)]
    for given, teaser, is_shown in (
        (samples, "images/teaser.png", True),
        (samples[:3], "images/teaser.png", False),
        (samples[:1], None, True),
    ):
        card = model.model_card(facts(samples=given, teaser=teaser))
        rows = [f"| {s.prompt} | ![base]({s.base_image}) | ![this model]({s.image}) |" for s in given]
        assert [row in card.text for row in rows] == [is_shown] * len(given)
        assert ("## Samples" in card.text) == is_shown and [w["text"] for w in card.data.widget] == [
            s.prompt for s in given
        ]


@pytest.mark.parametrize("changes", [{}, {"is_lora": False}, {"base": None}, *({"base": base} for base in LICENSES)])
def test_the_hub_takes_the_metadata(changes):
    """By the rules that its documentation and its messages tell."""
    card = model.model_card(facts(**changes), EVALUATION)
    assert check_card(str(card), "model") == ([], [])


def test_an_unknown_licence_is_left_open():
    """The card says whose licence holds."""
    card = model.model_card(facts(base="user/base"))
    assert "license" not in card.data.to_dict()
    assert (
        "The licence of [user/base](https://huggingface.co/user/base) holds for this model too: look it up there."
        in card.text
    )


def test_several_bases():
    """First the one that the widget draws with, then the LoRA that the training started at; an unpublished LoRA is none."""
    card = model.model_card(facts(has_initial_lora=True, initial_lora="user/lora"))
    assert card.data.base_model == [SDXL, "user/lora"] and card.data.to_dict()["base_model_relation"] == "adapter"
    assert "The training started at [user/lora](https://huggingface.co/user/lora)." in card.text
    card = model.model_card(facts(has_initial_lora=True))
    assert card.data.base_model == SDXL and "another LoRA, which is not published" in card.text


PROGRAMS = {
    "lora": {},
    "full": {"is_lora": False},
    "reversed lora": {"is_reversed": True},
    "reversed full": {"is_lora": False, "is_reversed": True},
    "local base": {"base": None, "base_folder": "my base"},
    "unnamed base": {"base": None},
    "base in a file": {"base": None, "base_folder": "my base.safetensors"},
    "base in a linked file": {"base": "user/base", "base_file": "a b.safetensors"},
    "vae": {"vae": "user/vae", "vae_class": "AutoencoderKL"},
    "vae of a pipeline": {"vae": "user/base", "vae_class": "AutoencoderKL", "vae_subfolder": "vae"},
    "changed base": {"base_changes": ["a LoRA fused into it"]},
    "no t5": {"loading_arguments": "dtype=torch.bfloat16, text_encoder_3=None, tokenizer_3=None"},
    "sibling": {"sample_model": "user/turbo", "sample_arguments": "height=1024, width=1024, num_inference_steps=4"},
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_code_calls_what_it_has_imported(kind):
    """Every name is imported or assigned before it is used, and every block of Python parses."""
    card = model.model_card(facts(**PROGRAMS[kind]))
    programs = blocks(card, "python")
    for program in programs:
        if "import" not in program:
            continue
        known = set()
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        used = {node.id for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Name)}
        assert used <= known, program
        assert ("load_lora_weights" in program) == ("full" not in kind)
    assert len([program for program in programs if "import" in program]) == (2 if kind == "sibling" else 1)
    first = programs[0]
    assert ("vae=vae" in first) == ("vae" in kind) and ('subfolder="vae"' in first) == (kind == "vae of a pipeline")
    assert ("stands for its folder" in first) == (kind in ("local base", "unnamed base"))
    assert ("StableDiffusionXLPipeline.from_single_file(" in first) == ("file" in kind)
    if kind == "base in a linked file":
        assert f'"https://huggingface.co/user/base/blob/{facts().base_revision}/a%20b.safetensors"' in first
    assert ("negative_preference_guidance" in first) == (kind == "reversed lora")
    assert ("set_adapters" in card.text) == (kind not in ("full", "reversed full", "reversed lora"))


def test_the_command_that_measures():
    """It names base and model, as what each is."""
    further = "--prompts parti --metrics pickscore hpsv2 --output_dir evaluation"
    for changes, base, models in (
        ({}, SDXL, f"trained=user/sdxl-iapo --base_model {SDXL}"),
        ({"is_lora": False}, SDXL, "trained=user/sdxl-iapo"),
        ({"is_reversed": True}, SDXL, f"guided={SDXL} --negative_loras guided=user/sdxl-iapo"),
        ({"base": None, "base_folder": "my base"}, "'my base'", "trained=user/sdxl-iapo --base_model 'my base'"),
    ):
        printed = blocks(model.model_card(facts(**changes)), "bash")[-1].replace("\\\n", "")
        assert shlex.split(printed) == shlex.split(f"trl-diffusion evaluate --models base={base} {models} {further}")


def test_what_a_recipe_is_without_is_asked_for():
    """Flags for a base, data and an expert that are not published; the folder of a base is in the recipe, and nobody else's."""
    known = facts().recipe
    for changes, flags in (
        ({}, ""),
        ({"base": None, "base_folder": "base", "recipe": known}, "`--model_name_or_path`"),
        ({"base": None, "recipe": {"beta": 1.0}}, "`--model_name_or_path` and `--dataset_name`"),
        ({"expert": "not published"}, "`--expert`"),
        ({"expert": "user/expert", "recipe": {**known, "expert": "user/expert"}}, ""),
    ):
        end = f" with {flags} of your own: what was used is not published." if flags else "."
        assert f"`trl-diffusion instance-dpo --config training.yaml`{end}\n" in model.model_card(facts(**changes)).text


def cited(card: ModelCard) -> list[str]:
    return [re.match(r"@\w+\{(\w+),", block)[1] for block in blocks(card, "bibtex")]


def test_citations():
    """The method's paper, what it builds on, Diffusion-NPO where the preference is reversed, and the libraries."""
    libraries = ["trl_diffusion", "vonwerra2020trl", "vonplaten2022diffusers"]
    assert cited(model.model_card(facts())) == ["sun2026iapo", "wallace2024diffusion", *libraries]
    assert cited(model.model_card(facts(is_reversed=True)))[2] == "wang2025diffusion"
    paper = {"title": "Beyond", "id": "2601.04300", "citation": "@article{meng2026beyond,\n}"}
    card = model.model_card(facts(trainer="ComplexPOTrainer", paper=paper))
    assert cited(card) == ["meng2026beyond", "wallace2024diffusion", *libraries]
    assert "[Beyond](https://huggingface.co/papers/2601.04300)" in card.text
    assert cited(model.model_card(facts(trainer="AttributeSFTTrainer", paper=paper))) == ["meng2026beyond", *libraries]
    assert cited(model.model_card(facts(trainer="SomebodysTrainer", paper={"title": "x"}))) == libraries


def test_citations_of_cpo_without_an_expert():
    """Degraded prompts are DDSPO's, whose paper is cited too; with the words of attributes it is not."""
    paper = {"title": "Beyond", "id": "2601.04300", "citation": "@article{meng2026beyond,\n}"}
    for asked, added in (("degraded", ["kim2025ddspo"]), ("attributes", []), (None, [])):
        card = model.model_card(
            facts(trainer="ComplexPOTrainer", paper=paper, hyperparameters={"target_prompts": asked})
        )
        assert cited(card)[:-3] == ["meng2026beyond", "wallace2024diffusion", *added]


def test_entries_are_written_alike():
    """One field a line, four spaces before it, equals signs below each other, the title in two pairs of braces, a year at least."""
    own = {name: getattr(trl_diffusion, name).method.paper["citation"] for name in METHODS}
    assert own["DDSPOTrainer"] == CITATIONS["DDSPO"]
    for entry in [*own.values(), *CITATIONS.values()]:
        assert entry.count("{") == entry.count("}")
        head, *lines, end = entry.splitlines()
        assert re.fullmatch(r"@(article|inproceedings|software)\{\w+,", head) and end == "}"
        fields = [re.fullmatch(r"    (\w+) *= \{(.+)", line) for line in lines if not line.startswith(" " * 5)]
        assert all(fields) and len({line.index("=") for line in lines if " = " in line}) == 1, head
        names = [field[1] for field in fields]
        assert names[:2] == ["title", "author"] and "year" in names and fields[0][2].startswith("{"), head
        assert ("booktitle" in names) == head.startswith("@inproceedings"), head


def test_the_papers_are_those_of_the_citation_file():
    """Title, authors, venue, year and number of each paper that cards cite are those of CITATION.cff, which has InPO besides."""
    known = {each["title"]: each for each in yaml.safe_load(Path("CITATION.cff").read_text())["references"]}
    entries = [getattr(trl_diffusion, name).method.paper["citation"] for name in METHODS] + list(CITATIONS.values())
    papers = [entry for entry in entries if not entry.startswith("@software")]
    for entry in papers:
        assert (paper := known.get(re.search(r"\{\{(.+)\}\}", entry)[1])), entry
        assert f"{{{paper['year']}}}" in entry
        assert ("conference" in paper) == ("booktitle" in entry)
        if "conference" in paper:
            assert paper["conference"]["name"] == f"{re.search(r'booktitle = .(.+).,', entry)[1]} {paper['year']}"
        numbers = [each["value"] for each in paper.get("identifiers", [])]
        assert re.findall(r"arXiv:[\d.]+", entry) == numbers
        if "family-names" in paper["authors"][0]:
            names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
            written = re.search(r"author += \{(.+?)\},$", entry, re.DOTALL | re.MULTILINE)[1]
            assert re.sub(r"\s+", " ", written) == " and ".join(names)
    titles = {re.search(r"\{\{(.+)\}\}", entry)[1] for entry in papers}
    assert {paper["abbreviation"] for title, paper in known.items() if title not in titles} == {"InPO"}


def test_the_library_is_cited_as_in_its_own_file():
    """Title, authors and licence are those of CITATION.cff."""
    known = yaml.safe_load(Path("CITATION.cff").read_text())
    entry = CITATIONS["trl_diffusion"].replace("\\_", "_")
    assert f"{{{{{known['title']}}}}}" in entry and known["authors"][0]["name"] in entry and known["license"] in entry
    papers = {each["abbreviation"]: each for each in known["references"]}
    for author in papers["Diffusion-NPO"]["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in CITATIONS["Diffusion-NPO"]


def test_every_trainer_has_its_sentences():
    """Two each, and a command of this library."""
    from trl_diffusion.cli.main import COMMANDS

    assert set(METHODS) == {
        "InstanceDPOTrainer",
        "AttributeSFTTrainer",
        "ComplexPOTrainer",
        "DDSPOTrainer",
        "DiffusionKTOTrainer",
    }
    for text in METHODS.values():
        assert text.description.count(". ") == 1 and text.description.endswith(".") and text.script in COMMANDS
    assert "this is Diffusion-DPO" in model.model_card(facts(hyperparameters={"w_neg": 1.0})).text
    assert "this is Diffusion-DPO" not in model.model_card(facts()).text


def test_a_loss_without_a_reference():
    """A card of MaPO does not say that the policy is compared with the model before the training; the others do, with their loss."""
    for loss in ("sigmoid", *PAIR_LOSSES):
        text = model.model_card(facts(hyperparameters={"loss_type": loss, "w_neg": 0.0})).text
        assert ("measured from the model before the training" in text) == (loss != "mapo")
        assert ("plays no part in it" in text) == (loss == "mapo")
        assert "a mask takes its region out of the comparison" in text
        assert ("by the loss of" in text) == (loss != "sigmoid")


def test_the_arm_that_is_asked_for():
    """Plain Diffusion-DPO is the arm itself, and a reversed model is no model that one compares so."""
    for changes, arm in (
        ({}, "`w_neg` 1, which is Diffusion-DPO, too:"),
        ({"trainer": "ComplexPOTrainer"}, "supervised fine-tuning on the same images, too:"),
        ({"trainer": "AttributeSFTTrainer"}, None),
        ({"hyperparameters": {"w_neg": 1.0}}, None),
        ({"is_reversed": True}, None),
    ):
        text = model.model_card(facts(**changes)).text
        assert ("to know what the method itself adds" in text) == (arm is not None) and (arm or "") in text
        assert ("Here the two are swapped" in text) == ("is_reversed" in changes)


def test_an_expert():
    """One on the Hub is a link, a folder's name is not, and an unpublished one is not named."""
    link = "- Expert: [user/expert](https://huggingface.co/user/expert)."
    for expert, said in (
        ("user/expert", link),
        ("painting-expert", "- Expert: `painting-expert`."),
        ("not published", None),
    ):
        text = model.model_card(facts(expert=expert)).text
        assert said in text if said else "- Expert:" not in text


def test_facts_survive_their_file(tmp_path):
    """A card from the file is the card from the training."""
    write_facts(facts(), tmp_path / "training.json")
    assert read_model_facts(tmp_path / "training.json") == facts()
    assert str(model.model_card(read_model_facts(tmp_path / "training.json"))) == str(model.model_card(facts()))


# ---- Hostile text ----


def hostile_facts(text: str) -> ModelFacts:
    """The text wherever somebody else's text can stand."""
    return facts(
        name=text, model_id=text, method=text, unit=text, tags=["iapo", text],
        paper={"title": text, "venue": text, "citation": f"@article{{{text},\n}}"},
        base=text, base_revision=text, base_folder=text, base_file=text, base_changes=[text], recipe_file=text, initial_lora=text, has_initial_lora=True,
        vae=text, vae_class="AutoencoderKL", vae_subfolder=text, sample_model=text, sample_arguments="height=8",
        example_prompt=text, expert=text,
        data=DataFacts(text, text, text, text, text, 4),
        samples=[Sample(text, "images/sample-0.png", "images/sample-0-base.png")],
        hyperparameters={"beta": 1.0, text: text}, recipe={"output_dir": text, text: [text]}, command=f"trl-diffusion {text}",
        last_logs={text: 1.0}, hardware=text, trackers={"wandb": f"https://wandb.ai/{text}"}, versions={text: text},
    )  # fmt: skip


BENIGN = structure(model.model_card(hostile_facts("a text")))


@pytest.mark.parametrize("text", HOSTILE + INVISIBLE)
def test_hostile_text_breaks_no_card(text):
    """Headings, links, pictures, HTML, rows and columns are those of a card with an ordinary text there; the metadata is read again."""
    card = model.model_card(hostile_facts(text))
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text
    assert card.data.model_name == plain(text) and plain(text) in card.data.tags
    assert card.data.widget == [{"text": plain(text), "output": {"url": "images/sample-0.png"}}]
    bases = [card.data.base_model] if isinstance(card.data.base_model, str) else card.data.base_model or []
    assert all(map(is_hub_id, [*(card.data.datasets or []), *bases]))
    tokens = parsed(card)
    kinds = ("image", "html_block", "html_inline", "heading_open", "hr", "table_open", "tr_open", "td_open", "th_open", "fence", "blockquote_open",
             "bullet_list_open", "ordered_list_open", "list_item_open", "code_block", "em_open", "strong_open", "s_open")  # fmt: skip
    counts = {kind: sum(token.type == kind for token in tokens) for kind in kinds}
    assert counts == {kind: sum(each[0] == kind for each in BENIGN) for kind in kinds}
    targets = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert all(
        re.match(r"https://huggingface\.co/|https://wandb\.ai/|comfyui/|pytorch_lora_weights", target)
        for target in targets
    )
    for program in blocks(card, "python"):
        ast.parse(program)
    assert yaml.safe_load(blocks(card, "yaml")[0]) == {"output_dir": text, text: [text]}
    if "\x00" not in text and "\ud800" not in text:
        shlex.split(blocks(card, "bash")[-1])


def test_the_prompt_is_the_prompt():
    """The code of a card draws the prompt that was given, to the character."""
    for text in HOSTILE + INVISIBLE:
        tree = ast.parse(blocks(model.model_card(facts(example_prompt=text)), "python")[0])
        (prompt,) = [
            word.value.value for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg == "prompt"
        ]
        assert prompt == text


@pytest.mark.parametrize("path", ["/home/me/a.png", "../a.png", "https://evil.org/a.png"])
def test_pictures_from_elsewhere_are_left_out(path):
    """A file of the machine, or an address, is no picture of a card."""
    card = model.model_card(facts(samples=[Sample("a", path, path)], teaser=path, curves=path, masks=path))
    assert path not in str(card) and "widget" not in card.data.to_dict()


def test_a_card_names_the_loss_of_pairs():
    """Another loss is named and cited, as is the safeguard; only the sigmoid without a mask is called Diffusion-DPO."""
    text = model.model_card(facts(hyperparameters={"w_neg": 1.0, "loss_type": "dmpo", "safeguard_mu": 0.9})).text
    assert "by the loss of DMPO" in text and "arXiv:2507.07510" in text and "arXiv:2511.03317" in text
    assert "no region is taken out." in text and "this is Diffusion-DPO" not in text
    text = model.model_card(facts(hyperparameters={"w_neg": 0.0, "loss_type": "ipo"})).text
    assert "the same training with `w_neg` 1" in text and "which is Diffusion-DPO" not in text
    text = model.model_card(
        facts(hyperparameters={"w_neg": 0.0, "loss_type": "sigmoid", "grouped_instances": True})
    ).text
    assert "each instance is compared by itself" in text and "by the loss of" not in text
