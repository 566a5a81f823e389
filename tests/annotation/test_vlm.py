# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Answers are validated, prompts are files, and the models in this process answer each request for itself."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.annotation import tiny_models
from trl_diffusion.annotation.detector import Detection, TransformersDetector, best_hit
from trl_diffusion.annotation.judge import Verdict
from trl_diffusion.annotation.planner import Plan
from trl_diffusion.annotation.transformers_vlm import TransformersVLM, ended
from trl_diffusion.annotation.vlm import (
    VLM,
    GenerationError,
    PromptTemplate,
    Request,
    ask,
    validate,
)
from trl_diffusion.revisions import resolve_revision


class Scripted(VLM):
    """Returns scripted lists of texts, and records the requests."""

    def __init__(self, *texts: list[str | GenerationError]):
        self.texts, self.calls = list(texts), []

    def describe(self) -> dict:
        return {"model": "scripted", "revision": "1"}

    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        self.calls.append(requests)
        return self.texts.pop(0)


def question(text: str = "Which is better?", seed: int = 0) -> Request:
    return Request(text, (tiny.image(seed),), Verdict)


class TestValidate:
    @pytest.mark.parametrize(
        "text",
        [
            '{"better": "A"}',
            '```json\n{"better": "A"}\n```',
            '```\n{\n  "better": "A"\n}\n```\n',
            'I looked at both. The answer is {"better": "A"}, since its wheels are round.',
            '{"better": "A", "why": "its wheels are round"}',
        ],
    )
    def test_an_object_is_found_wherever_it_stands(self, text):
        """JSON is found alone, in a code block, between words and with more keys; the raw text is kept."""
        answer = validate(text, Verdict)
        assert (answer.value, answer.raw, answer.error) == (Verdict(better="A"), text, None)

    def test_braces_within_a_string_do_not_end_an_object(self):
        """Braces in strings are text."""
        assert validate('so: {"instances": ["a } b", "{c"]}.', Plan).value.instances == ["a } b", "{c"]

    @pytest.mark.parametrize(
        "text, error",
        [
            ("", "the answer is empty"),
            ("A is better.", "there is no JSON object in it"),
            ('{"better": "A"', "its JSON object is cut off"),
            ("} {", "there is no JSON object in it"),
            ('{"best": "A"}', "better: Field required"),
            ('{"better": "C"}', "better: Input should be 'A' or 'B'"),
            ('{"better": 1}', "better: Input should be 'A' or 'B'"),
            ('{"better": ["A"]}', "better: Input should be 'A' or 'B'"),
            ('{"better": "A"} or {"better": "B"}', "there are 2 answers in it that differ"),
            ("{'better': 'A'}", "Invalid JSON: Expecting property name"),
        ],
    )
    def test_everything_else_is_an_error_with_a_reason(self, text, error):
        """An invalid answer has a one-line reason and no value."""
        answer = validate(text, Verdict)
        assert answer.value is None and error in answer.error and "\n" not in answer.error
        assert answer.raw.strip() == text.strip()

    def test_at_most_three_mistakes_are_told(self):
        """At most three mistakes are reported to the model."""
        answer = validate(json.dumps({"instances": [1, 2, 3, 4, 5]}), Plan)
        assert [mistake.split(":")[0] for mistake in answer.error.split("; ")] == [
            "instances.0",
            "instances.1",
            "instances.2",
        ]


class TestAsk:
    def test_answers_keep_the_order_of_the_requests(self):
        """Each request gets its own answer, and one round is enough if all are valid."""
        requests = [question(seed=seed) for seed in range(5)]
        vlm = Scripted([f'{{"better": "{letter}"}}' for letter in "ABBAB"])
        assert "".join(answer.value.better for answer in ask(vlm, requests)) == "ABBAB"
        assert vlm.calls == [requests]

    def test_a_mistake_is_asked_about_once_more(self):
        """Only invalid answers are requested again, with the same images, the raw answer and the reason."""
        requests = [question(f"Question {index} {{raw}}?", index) for index in range(4)]
        wrong = '{"better": "C"}'
        vlm = Scripted(
            ['{"better": "A"}', wrong, '{"better": "B"}', ""],
            ["I see no difference", '{"better": "B"}'],
        )
        answers = ask(vlm, requests)
        assert [answer.value and answer.value.better for answer in answers] == ["A", None, "B", "B"]
        assert answers[1].raw == "I see no difference" and answers[1].error == "there is no JSON object in it"
        assert len(vlm.calls) == 2
        for again, index in zip(vlm.calls[1], (1, 3), strict=True):
            assert again.images is requests[index].images and again.schema is Verdict
            assert again.text.startswith(f"Question {index} {{raw}}?\n")
        assert wrong in vlm.calls[1][0].text and "better: Input should be 'A' or 'B'" in vlm.calls[1][0].text

    def test_a_long_wrong_answer_is_quoted_in_part(self):
        """The retry quotes at most 500 characters of the wrong answer."""
        vlm = Scripted(["x" * 100_000], ['{"better": "A"}'])
        ask(vlm, [question()])
        assert vlm.calls[1][0].text.count("x") < 520

    def test_a_model_that_gave_nothing_is_not_asked_again(self):
        """A GenerationError is not retried: it is the error of the answer."""
        vlm = Scripted([GenerationError("the server answers 500"), '{"better": "A"}'])
        lost, fine = ask(vlm, [question(), question()])
        assert (lost.raw, lost.value, lost.error) == ("", None, "the server answers 500")
        assert fine.value.better == "A" and len(vlm.calls) == 1

    def test_the_last_text_is_kept_where_the_second_try_gives_none(self):
        """The first raw answer is kept if the retry gives no text."""
        (answer,) = ask(Scripted(["I cannot say"], [GenerationError("the server answers 500")]), [question()])
        assert (answer.raw, answer.value, answer.error) == ("I cannot say", None, "the server answers 500")


class TestPromptTemplate:
    def test_a_file_of_ones_own_takes_the_place_of_the_shipped_one(self, tmp_path):
        """The text of a file replaces the shipped prompt, and is described by its hash."""
        path = tmp_path / "judge.md"
        path.write_text("Is the {{ label }} better in A? ü\n")
        prompt = PromptTemplate("judge", path)
        assert prompt.render(label="cow") == "Is the cow better in A? ü"
        assert prompt.describe()["text"] == "Is the {{ label }} better in A? ü\n"
        path.write_text("Is the {{ label }} better in B?")
        digests = {PromptTemplate("judge", where).describe()["sha256"] for where in (path, None)}
        assert len({*digests, prompt.describe()["sha256"]}) == 3

    def test_what_fills_a_place_is_no_template(self):
        """A prompt with Jinja syntax is inserted unchanged."""
        text = PromptTemplate("planner").render(prompt="{{ 7 * 7 }} {% raw %}", max_instances=5)
        assert "{{ 7 * 7 }} {% raw %}" in text and "at most 5" in text

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"Is it {{ label ?", "judge.md, line 1: not a valid Jinja template"),
            (b"one\n{% for label %}", "judge.md, line 2: not a valid Jinja template"),
            (b"{{ label | nothing }}", "judge.md, line 1: not a valid Jinja template: No filter named 'nothing'"),
            (b"caf\xe9 {{ label }}", "The prompt of the judge cannot be read: .*utf-8"),
        ],
    )
    def test_a_broken_file_is_refused_before_anything_is_loaded(self, tmp_path, content, message):
        """An invalid template raises a ValueError with the line."""
        (tmp_path / "judge.md").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            PromptTemplate("judge", tmp_path / "judge.md")

    def test_a_missing_file_is_named(self, tmp_path):
        """A missing file or a folder raises a ValueError with role and path."""
        for path in (tmp_path / "none.md", tmp_path):
            with pytest.raises(ValueError, match=f"The prompt of the attribute expert cannot be read: .*{path}"):
                PromptTemplate("attribute_expert", path)

    def test_an_unknown_place_is_named_with_those_that_there_are(self, tmp_path):
        """An unknown variable raises a ValueError with the file, the variable and the known ones."""
        path = tmp_path / "judge.md"
        path.write_text("Is the {{ lable }} better?")
        with pytest.raises(ValueError, match="judge.md: 'lable' is undefined; the variables of this prompt are label"):
            PromptTemplate("judge", path).render(label="cow")


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory) -> Path:
    return tiny_models.tiny_vlm(tmp_path_factory.mktemp("vlm"))


def tiny_vlm(folder: Path, **options) -> TransformersVLM:
    return TransformersVLM(str(folder), **{"max_new_tokens": 12, "dtype": "float32", "device": "cpu", **options})


def texts(answers: Iterable[str | GenerationError]) -> list[str]:
    """The texts of answers, most of which are cut off, because a model with random weights does not end."""
    return [answer.raw if isinstance(answer, GenerationError) else answer for answer in answers]


def mixed_requests() -> list[Request]:
    """Short and long requests with two, one or no images of several shapes."""
    requests = []
    for index, (length, sizes) in enumerate(
        [
            (1, [(28, 28)]),
            (40, [(56, 56), (28, 28)]),
            (7, [(90, 20), (30, 70)]),
            (90, [(64, 40)]),
            (3, []),
            (1, [(8, 8)]),
        ]
    ):
        images = tuple(tiny.image(10 * index + place, *size) for place, size in enumerate(sizes))
        requests.append(Request("Which things are visible? " * length, images, Plan))
    return requests


class TestTransformersVLM:
    @pytest.mark.parametrize("batch_size", [2, 6])
    def test_answers_do_not_depend_on_the_batch(self, vlm_folder, batch_size):
        """Requests of all lengths and numbers of images get the same answers in batches as one at a time, in order."""
        requests = mixed_requests()
        alone = texts(answer for request in requests for answer in tiny_vlm(vlm_folder).generate([request]))
        assert texts(tiny_vlm(vlm_folder, batch_size=batch_size).generate(requests)) == alone
        assert len(set(alone)) == len(alone)

    def test_answers_depend_on_the_images_and_their_order(self, vlm_folder):
        """Answers depend on the pixels and the order of the images."""
        vlm = tiny_vlm(vlm_folder)
        bright, dark = Image.new("RGB", (56, 56), "white"), Image.new("RGB", (56, 56), "navy")
        pairs = [(bright, dark), (dark, bright), (bright, bright)]
        assert len(set(texts(vlm.generate([Request("Which?", images, Verdict) for images in pairs])))) == 3

    def test_an_answer_ends_at_its_limit(self, vlm_folder):
        """No answer has more tokens than `max_new_tokens`, and a smaller limit truncates the same answer."""
        (request,) = mixed_requests()[:1]
        vlm = tiny_vlm(vlm_folder)
        answers = [*vlm.generate([request]), *tiny_vlm(vlm_folder, max_new_tokens=3).generate([request])]
        assert [str(answer).split(":")[0] for answer in answers] == [
            "the answer is cut off after 12 tokens",
            "the answer is cut off after 3 tokens",
        ]
        long, short = texts(answers)
        assert 0 < len(short) < len(long)
        assert long.startswith(short.rstrip("\N{REPLACEMENT CHARACTER}"))

    def test_the_model_is_loaded_once_and_when_it_is_needed(self, vlm_folder, monkeypatch):
        """Describing a model loads nothing; two batches of requests load it once."""
        loads = []
        load = AutoModelForImageTextToText.from_pretrained
        monkeypatch.setattr(
            AutoModelForImageTextToText,
            "from_pretrained",
            lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs),
        )
        vlm = tiny_vlm(vlm_folder)
        vlm.describe()
        assert loads == []
        vlm.generate(mixed_requests()[:1])
        vlm.generate(mixed_requests()[1:3])
        assert loads == [(str(vlm_folder),)]

    def test_control_tokens_in_a_text_are_only_text(self, vlm_folder):
        """A prompt that contains special tokens, such as image placeholders, does not affect itself or its batch."""
        vlm = tiny_vlm(vlm_folder)
        fine = mixed_requests()[0]
        for token in ("<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|vision_start|>"):
            odd = Request(f"A cow {token} in a field", (tiny.image(1),), Plan)
            answer, neighbour = vlm.generate([odd, fine])
            assert texts([answer])[0] and texts([neighbour]) == texts(vlm.generate([fine]))
            plain = Request("A cow in a field", odd.images, Plan)
            counts = [
                (
                    vlm.encode([vlm.chat(request)])["input_ids"]
                    == vlm.processor.tokenizer.convert_tokens_to_ids(token)
                ).sum()
                for request in (odd, plain)
            ]
            assert counts[0] == counts[1]

    def test_a_request_that_the_processor_refuses_is_an_error_of_its_own(self, vlm_folder):
        """An image with an extreme aspect ratio gives a GenerationError with a reason; the other requests are
        answered."""
        vlm = tiny_vlm(vlm_folder)
        fine = mixed_requests()[:3]
        thin = Request("What is it?", (tiny.image(0, 1000, 4),), Plan)
        answers = vlm.generate([*fine[:2], thin, fine[2]])
        assert isinstance(answers[2], GenerationError) and "aspect ratio" in str(answers[2])
        assert texts([answers[0], answers[1], answers[3]]) == texts(vlm.generate(fine))

    def test_a_batch_that_needs_too_much_memory_is_asked_in_parts(self, vlm_folder, monkeypatch):
        """If there is no memory for a batch, its requests are answered one at a time, as alone; if there is none for one
        request, that one is an error."""
        vlm, requests = tiny_vlm(vlm_folder), mixed_requests()[:3]
        expected, generate = texts(vlm.generate(requests)), vlm.model.generate

        def failing(error: Exception, most: int):
            def run(**inputs):
                if len(inputs["input_ids"]) > most:
                    raise error
                return generate(**inputs)

            return run

        for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
            monkeypatch.setattr(vlm.model, "generate", failing(error, 1))
            assert texts(vlm.generate(requests)) == expected
            monkeypatch.setattr(vlm.model, "generate", failing(error, 0))
            answers = vlm.generate(requests)
            assert [str(answer).split(":")[0] for answer in answers] == [
                "the memory is too small for this request"
            ] * 3

    def test_what_the_model_raises_is_an_error_of_its_request(self, vlm_folder, monkeypatch):
        """An exception at one request costs only this request, with its reason; a mistake in the code is raised."""
        vlm, requests = tiny_vlm(vlm_folder), mixed_requests()[:3]
        expected, generate = texts(vlm.generate(requests)), vlm.model.generate
        widest = max(vlm.encode([vlm.chat(request)])["input_ids"].shape[1] for request in requests)

        def failing(error: Exception):
            def run(**inputs):
                if inputs["input_ids"].shape[1] == widest:
                    raise error
                return generate(**inputs)

            return run

        for error in (RuntimeError("CUDA error:\n device-side assert"), IndexError("index out of range")):
            monkeypatch.setattr(vlm.model, "generate", failing(error))
            answers = vlm.generate(requests)
            (lost,) = [index for index, text in enumerate(texts(answers)) if text == ""]
            words = " ".join(str(error).split())
            assert str(answers[lost]) == f"the model fails at this request: {type(error).__name__}: {words}"
            assert [text for i, text in enumerate(texts(answers)) if i != lost] == [
                text for i, text in enumerate(expected) if i != lost
            ]
        for error in (TypeError("a bug"), AttributeError("a bug"), NameError("a bug")):
            monkeypatch.setattr(vlm.model, "generate", failing(error))
            with pytest.raises(type(error), match="a bug"):
                vlm.generate(requests)

    def test_a_model_that_does_not_load_is_no_error_of_a_request(self, vlm_folder, tmp_path):
        """What fails in loading the model or its processor is raised."""
        for name in ("model.safetensors", "preprocessor_config.json"):
            broken = Path(shutil.copytree(vlm_folder, tmp_path / name))
            (broken / name).write_text("{")
            with pytest.raises(Exception):  # noqa: B017, what transformers raises differs between its versions
                tiny_vlm(broken).generate(mixed_requests()[:1])

    @pytest.mark.parametrize(
        "ends, expected", [(7, [True, False, True]), ([7, 5], [True, True, True]), (None, [False] * 3)]
    )
    def test_an_answer_has_ended_where_a_token_says_so(self, ends, expected):
        """An answer without one of the tokens that end one is cut off."""
        tokens = torch.tensor([[1, 7, 0], [1, 2, 5], [7, 0, 0]])
        assert ended(tokens, ends) == expected

    def test_other_families_load_by_name(self, tmp_path):
        """LLaVA, whose template and tokenizer both add the first token, has it once, and answers in batches as
        alone."""
        vlm = tiny_vlm(tiny_models.tiny_llava(tmp_path))
        requests = [request for request in mixed_requests() if request.images]
        ids = vlm.encode([vlm.chat(request) for request in requests])["input_ids"]
        assert (ids == vlm.processor.tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * len(requests)
        alone = texts(answer for request in requests for answer in vlm.generate([request]))
        assert texts(vlm.generate(requests)) == alone and len(set(alone)) == len(alone)


class TestRevisions:
    def test_a_folder_is_described_by_a_digest_of_its_files(self, vlm_folder, tmp_path):
        """A copy has the same hash; a changed weight, a changed file and a new file name each change it."""
        copy = Path(shutil.copytree(vlm_folder, tmp_path / "copy"))
        description = tiny_vlm(vlm_folder).describe()
        assert description["revision"].startswith("sha256:")
        assert tiny_vlm(copy).describe() == {**description, "model": str(copy)}
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        digests = [description["revision"], tiny_vlm(copy).describe()["revision"]]
        (copy / "generation_config.json").write_text('{"max_length": 3}')
        digests.append(resolve_revision(str(copy)))
        (copy / "generation_config.json").rename(copy / "other.json")
        digests.append(resolve_revision(str(copy)))
        assert len(set(digests)) == 4

    @pytest.mark.parametrize("name", ["nobody/has-this-model", "./no/such/folder", "no such model"])
    def test_a_name_that_leads_nowhere_is_a_readable_error(self, name):
        """A name that is neither a folder nor in the cache raises a one-line ValueError with the name, before
        loading."""
        for model in (TransformersVLM, TransformersDetector):
            with pytest.raises(ValueError, match="neither a folder nor a model on the Hub or in its cache") as caught:
                model(name)
            assert repr(name) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_name_in_the_cache_is_pinned_to_its_commit(self, vlm_folder, tmp_path, monkeypatch):
        """Without network, a Hub id resolves to the cached commit of its branch, and exactly this commit is loaded."""
        commit, other = "a" * 40, "b" * 40
        repository = tmp_path / "models--someone--tiny"
        shutil.copytree(vlm_folder, repository / "snapshots" / commit)
        shutil.copytree(tiny_models.tiny_llava(tmp_path / "llava"), repository / "snapshots" / other)
        (repository / "refs").mkdir()
        for branch, target in (("main", commit), ("next", other)):
            (repository / "refs" / branch).write_text(target)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for revision, resolved in ((None, commit), ("next", other), (commit, commit)):
            assert resolve_revision("someone/tiny", revision) == resolved
        vlm = tiny_vlm("someone/tiny")
        assert vlm.describe()["revision"] == commit
        (repository / "refs" / "main").write_text(other)  # the branch changes, the run does not
        expected = texts(tiny_vlm(vlm_folder).generate(mixed_requests()[:2]))
        assert texts(vlm.generate(mixed_requests()[:2])) == expected


SHAPES = {"portrait": (40, 72), "landscape": (80, 48), "square": (64, 64), "thin": (160, 20)}


@pytest.fixture(scope="module", params=["grounding_dino", "owl_vit"])
def detector_folder(request, tmp_path_factory) -> Path:
    make = {"grounding_dino": tiny_models.tiny_detector, "owl_vit": tiny_models.tiny_owl}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def detector(folder: Path, **options) -> TransformersDetector:
    return TransformersDetector(str(folder), **{"threshold": 0.0, "device": "cpu", **options})


def raw_hits(found: TransformersDetector, image: Image.Image, label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `(N,)` and unit boxes `(N, 4)` from the outputs of the model, for one image and one label."""
    with torch.inference_mode():
        outputs = found.model(**found.processor(images=image, text=[[label]], return_tensors="pt"))
    center_x, center_y, width, height = outputs.pred_boxes[0].unbind(-1)
    corners = [center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2]
    return outputs.logits[0].sigmoid().amax(-1), torch.stack(corners, dim=-1).clamp(0, 1)


def close(hit: Detection, score: torch.Tensor, box: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor([hit.score, *hit.box]), torch.cat([score[None], box]), atol=1e-5)


class TestTransformersDetector:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_boxes_are_in_the_frame_of_the_image(self, detector_folder, shape):
        """In an image of any shape, the detection is the model's most confident box, as a unit box of that image."""
        found = detector(detector_folder)
        for seed, label in enumerate(["cow", "tree", "a red cow"]):
            image = tiny.image(seed, *SHAPES[shape])
            (hit,) = found.detect([(image, label)])
            scores, boxes = raw_hits(found, image, label)
            assert close(hit, scores[scores.argmax()], boxes[scores.argmax()])
            assert 0 <= hit.box[0] < hit.box[2] <= 1 and 0 <= hit.box[1] < hit.box[3] <= 1

    def test_hits_do_not_depend_on_the_batch(self, detector_folder):
        """Images of all shapes with labels of all lengths give the same detections in batches as one at a time, in
        order."""
        labels = ["cow", "a big red cow", "tree", "x", "cow and tree"]
        queries = [
            (tiny.image(index, *SHAPES[shape]), label)
            for index, (label, shape) in enumerate((label, shape) for label in labels for shape in SHAPES)
        ]
        by_two, together = (detector(detector_folder, batch_size=size).detect(queries) for size in (2, 16))
        alone = [detector(detector_folder).detect_batch([query])[0] for query in queries[:5]]
        one_by_one = detector(detector_folder, batch_size=1).detect(queries)
        for hits in (by_two, together, alone):
            for hit, expected in zip(hits, one_by_one):
                assert close(hit, torch.tensor(expected.score), torch.tensor(expected.box))
        for hits in (by_two, together):
            assert len({tuple(hit.box) for hit in hits}) > len(queries) / 2

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_a_batch_of_nothing_is_refused(self, batch_size):
        """With -1 there would be no batch at all: every instance would be dropped, every answer empty."""
        for role in (TransformersDetector, TransformersVLM):
            with pytest.raises(ValueError, match=f"batch size must be at least 1, got {batch_size}"):
                role("anything", batch_size=batch_size)

    def test_what_is_below_the_threshold_is_nothing(self, detector_folder):
        """A threshold just below the best score keeps the detection, one just above it gives `None`."""
        image = tiny.image(3, *SHAPES["landscape"])
        (hit,) = detector(detector_folder).detect([(image, "tree")])
        kept = detector(detector_folder, threshold=hit.score - 1e-3).detect([(image, "tree")])
        assert close(kept[0], torch.tensor(hit.score), torch.tensor(hit.box))
        assert detector(detector_folder, threshold=min(hit.score + 1e-3, 1 - 1e-9)).detect([(image, "tree")]) == [None]

    def test_labels_of_any_length_and_spelling_are_taken(self, detector_folder):
        """Labels of eighty letters, with punctuation or unknown characters, are searched for like any other."""
        labels = ["x" * 80, "cow? tree!", "St. Bernard", "[SEP]", "牛", "..."]
        hits = detector(detector_folder).detect([(tiny.image(0, 64, 48), label) for label in labels])
        assert all(hit is not None for hit in hits)

    def test_a_full_stop_does_not_end_a_label(self, detector_folder):
        """A full stop in a label does not end the phrase of Grounding DINO."""
        found = detector(detector_folder)
        image = tiny.image(0, 64, 48)
        stopped, spaced = found.detect([(image, "a.cow"), (image, "a cow")])
        assert stopped == spaced

    def test_the_detector_is_described_and_loaded_late(self, detector_folder):
        """The description contains everything that a detection depends on, and does not load the model."""
        found = detector(detector_folder, threshold=0.25)
        assert found.describe() == {
            "model": str(detector_folder),
            "revision": resolve_revision(str(detector_folder)),
            "threshold": 0.25,
            "dtype": "float32",
        }
        assert "model" not in vars(found)

    @pytest.mark.parametrize("threshold", [-0.1, 1.0, 30])
    def test_a_threshold_is_a_share(self, threshold):
        """A threshold outside of [0, 1) raises a ValueError, before any name is resolved."""
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            TransformersDetector("nobody/has-this-model", threshold=threshold)


def test_the_best_hit_covers_something():
    """The most confident detection with an area inside the image is selected, as a unit box."""
    image = Image.new("RGB", (200, 100))
    boxes = torch.tensor([[20.0, 10, 60, 90], [-50, 30, 220, 70], [60, 10, 60, 90], [210, 10, 260, 90]])
    result = {"boxes": boxes, "scores": torch.tensor([0.4, 0.5, 0.9, 0.8])}
    hit = best_hit(result, image)
    assert hit.box == pytest.approx([0, 0.3, 1, 0.7]) and hit.score == pytest.approx(0.5)
    hit = best_hit({name: value[[0, 2, 3]] for name, value in result.items()}, image)
    assert hit.box == pytest.approx([0.1, 0.1, 0.3, 0.9]) and hit.score == pytest.approx(0.4)
    for rows in ([2, 3], []):
        assert best_hit({name: value[rows] for name, value in result.items()}, image) is None
