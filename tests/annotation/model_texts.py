# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Texts of vision-language models, with the answer that is in them, or the reason why there is none."""

EXAMPLE = '{"instances": ["eagle", "red car"]}'
QUESTION = f"Which things are visible?\n\nAnswer with one JSON object and nothing else, like this:\n\n{EXAMPLE}\n"
DOG = '{"instances": ["dog"]}'

# A name, the text, and what comes out: labels, or a part of the error
TEXTS: list[tuple[str, str, list[str] | str]] = [
    ("the object alone", DOG, ["dog"]),
    ("a code block", f"```json\n{DOG}\n```", ["dog"]),
    ("text around it", f"Here it is: {DOG} I hope this helps.", ["dog"]),
    ("text with braces before it", f"I looked at {{both}} images: {DOG}", ["dog"]),
    ("boxed", f"\\boxed{{{DOG}}}", ["dog"]),
    ("braces in a string", '{"instances": ["a } b", "{c"]} {done}', ["a } b", "{c"]),
    ("characters of other scripts", '{"instances": ["犬", "🐶", "\\u72ac"]}', ["犬", "🐶", "犬"]),
    ("further fields", '{"instances": ["dog"], "why": "it barks"}', ["dog"]),
    ("further fields with thoughts", '{"thought": {"instances": ["eagle"]}, "instances": ["dog"]}', ["dog"]),
    ("an empty answer", '{"instances": []}', []),
    # thoughts
    ("thoughts", f"<think>Like {EXAMPLE}? No.</think>\n{DOG}", ["dog"]),
    ("thoughts in capitals", f"<THINK>Like {EXAMPLE}?</THINK>{DOG}", ["dog"]),
    ("thoughts with another tag", f"<thinking>Like {EXAMPLE}?</thinking>{DOG}", ["dog"]),
    ("reasoning", f"<reasoning>Like {EXAMPLE}?</reasoning><answer>{DOG}</answer>", ["dog"]),
    ("empty thoughts", f"<think>\n\n</think>\n\n{DOG}", ["dog"]),
    ("thoughts within thoughts", f"<think>a<think>b {EXAMPLE}</think>c {EXAMPLE}</think>{DOG}", ["dog"]),
    (
        "other thoughts within thoughts, cut off",
        f"<think>a<reasoning>b</reasoning> {EXAMPLE}",
        "ends within its thoughts",
    ),
    ("thoughts after the answer", f"{DOG}<think>Or {EXAMPLE}?</think>", ["dog"]),
    ("thoughts without an opening tag", f"It should be like {EXAMPLE}.\n</think>\n\n{DOG}", ["dog"]),
    ("thoughts that are cut off", f"<think>The form is {EXAMPLE}, and in the images", "ends within its thoughts"),
    ("an answer and thoughts that are cut off", f"{DOG}<think>The form is {EXAMPLE}", "ends within its thoughts"),
    ("thoughts and nothing else", f"<think>The form is {EXAMPLE}.</think>", "thoughts, but no answer"),
    ("thoughts without an opening tag, no answer", f"The form is {EXAMPLE}.</think>", "thoughts, but no answer"),
    ("thoughts in brackets", f"[THINK]Like {EXAMPLE}?[/THINK]{DOG}", ["dog"]),
    ("thoughts of Kimi", f"◁think▷Like {EXAMPLE}?◁/think▷{DOG}", ["dog"]),
    ("thoughts of Kimi, cut off", f"◁think▷Like {EXAMPLE}?", "ends within its thoughts"),
    (
        "channels",
        f"<|channel|>analysis<|message|>Like {EXAMPLE}<|end|><|start|>assistant<|channel|>final<|message|>{DOG}<|return|>",
        ["dog"],
    ),
    (
        "channels with a format",
        f"<|channel|>analysis<|message|>{EXAMPLE}<|end|><|channel|>final <|constrain|>json<|message|>{DOG}",
        ["dog"],
    ),
    ("channels, cut off", f"<|channel|>analysis<|message|>The form is {EXAMPLE}", "ends within its thoughts"),
    ("channels without their tokens", f"analysisWe need {EXAMPLE}.assistantfinal{DOG}", ["dog"]),
    ("channels without their tokens, cut off", f"analysisWe need {EXAMPLE}", "ends within its thoughts"),
    ("a box of GLM", f"<think>{EXAMPLE}</think><|begin_of_box|>{DOG}<|end_of_box|>", ["dog"]),
    ("thoughts without tags", f"The form is {EXAMPLE}. I see a dog, so: {DOG}", ["dog"]),
    (
        "thoughts without tags, cut off",
        f"Okay, the form is {EXAMPLE}. In the first image I",
        "only quotes the example",
    ),
    # the example as the answer
    ("the example, alone", EXAMPLE, ["eagle", "red car"]),
    ("the example after words", f"Both show this: {EXAMPLE}", ["eagle", "red car"]),
    ("the example in tags", f"<answer>{EXAMPLE}</answer>", ["eagle", "red car"]),
    # cut off
    ("cut off in a list", '{"instances": ["dog", "ca', "is cut off"),
    ("cut off before the end", '{"instances": ["dog"]', "is cut off"),
    ("cut off within a wrapper", '{"answer": {"instances": ["dog"]}, "', "is cut off"),
    ("cut off within a list of objects", f"[{DOG}, {DOG[:9]}", "is cut off"),
    ("cut off in the second answer", f"{DOG}\n{DOG[:14]}", "is cut off"),
    # forms
    ("twice the same", f"{DOG}\n\n{DOG}", ["dog"]),
    ("twice the same, otherwise written", f'{DOG}\n```\n{{"why": "", "instances":["dog"]}}\n```', ["dog"]),
    ("two that differ", '{"instances": ["dog"]} or {"instances": ["cat"]}', "2 answers in it that differ"),
    ("a correction", '{"instances": ["dog"]} Wait: {"instances": ["cat"]}', "2 answers in it that differ"),
    ("another object before it", f'{{"image": 1}} {DOG}', ["dog"]),
    ("a list of one", f"[{DOG}]", ["dog"]),
    ("a list of two", f'[{DOG}, {{"instances": ["cat"]}}]', "2 answers in it that differ"),
    ("a list of labels", '["dog", "cat"]', "no JSON object"),
    ("within another object", f'{{"answer": {DOG}}}', ["dog"]),
    ("within two objects", f'{{"result": {{"answer": {DOG}}}}}', ["dog"]),
    ("within an object, as a list", f'{{"answer": [{DOG}]}}', ["dog"]),
    ("within an object, as a string", '{"answer": "{\\"instances\\": [\\"dog\\"]}"}', ["dog"]),
    ("a string", '"{\\"instances\\": [\\"dog\\"]}"', ["dog"]),
    # faults
    ("nothing", "", "the answer is empty"),
    ("spaces", " \n", "the answer is empty"),
    ("words", "I see a dog.", "no JSON object"),
    ("another field", '{"things": ["dog"]}', "instances: Field required"),
    ("a text instead of a list", '{"instances": "dog"}', "instances: Input should be a valid list"),
    ("a number as a label", '{"instances": [1]}', "instances.0: Input should be a valid string"),
    ("null", '{"instances": null}', "instances: Input should be a valid list"),
    ("a key twice", '{"instances": ["dog"], "instances": ["cat"]}', "'instances' stands twice"),
    ("a comma too many", '{"instances": ["dog",]}', "Invalid JSON"),
    ("single quotes", "{'instances': ['dog']}", "Invalid JSON"),
    ("a comment", '{"instances": ["dog"] // it barks\n}', "Invalid JSON"),
    ("not a number", '{"instances": ["dog"], "score": NaN}', "NaN is no number"),
    ("a line break in a string", '{"instances": ["a\ndog"]}', "Invalid JSON"),
    ("half a character", '{"instances": ["\\ud83d"]}', "instances.0: Input should be a valid string"),
    ("too deep", '{"instances": ' + "[" * 100_000, "Invalid JSON"),
    ("too many digits", '{"instances": [], "n": ' + "9" * 5000 + "}", "Invalid JSON"),
]
