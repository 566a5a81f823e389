# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Text of others stands in a card as it is, and as nothing but text."""

import ast

import pytest
import yaml
from markdown_it import MarkdownIt

from trl_diffusion.cards.text import (
    address,
    code_span,
    fenced,
    hub_link,
    is_beside,
    one_line,
    picture,
    plain,
    python_string,
    shortened,
    with_code,
    yaml_text,
)


HOSTILE = [
    "`", "``` python", "`a` and ``b``", "a | b", "|", "a\\|b", "\\", "\\(x\\)", "$x$ and $$y$$", "a\nb\n# c", "---", "- a", "+ a", "* a",
    "1. a", "2) b", "# a", "a #", "a ##", "> a", "=== ", ":---", ":-: | :-:", "{{ x }}", "{% if x %}", "{# x #}", "<script>alert(1)</script>",
    "<b>", "</td>", "<!-- x -->", "&lt;b&gt; &amp; &#35;", "[a](https://evil.org)", "![a](b.png)", "<https://evil.org>", "[a]: https://evil.org",
    "https://evil.org", "www.evil.org", "a@evil.org", "@user", ":smile:", "_a_", "__init__", "*a*", "**a**", "~~a~~", "~a~", "~~~", "a_b_c",
    "    code", "\tcode", "a  \nb", "é ü 中文 🎨 👩‍🎨", "key: value", "#comment", "!!python/object:x", "&a *a", "yes", "007", "1e3", "-0.5",
    "'", '"', "'''", '"""', "%s", "}", "a" * 5000, "<" * 300, "`" * 50, "[^1]", "[x]", "- [x] a", "^", "\\`", "x\\", "`|`",
]  # fmt: skip
INVISIBLE = [
    "\u202egnp.exe",
    "a\u2066b",
    "\u200fa",
    "a\u2028b",
    "a\x00b",
    "\x1b[31mred",
    "a\u200bb",
    "\ufeffa",
    "\ud800",
]
markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def inline(text: str) -> list:
    """The inline tokens of a paragraph that starts with the text."""
    tokens = markdown.parse(text)
    assert [token.type for token in tokens] in ([], ["paragraph_open", "inline", "paragraph_close"]), text
    return tokens[1].children if tokens else []


def shown(tokens: list) -> str:
    return "".join(token.content for token in tokens)


@pytest.mark.parametrize("text", HOSTILE + INVISIBLE)
def test_a_line_shows_the_text_and_nothing_else(text):
    """In a paragraph, behind other text, in a heading, as the text of a link, and in a cell of a table."""
    line = one_line(text)
    expected = plain(text)
    tokens = inline(line)
    assert {token.type for token in tokens} <= {"text"} and shown(tokens) == expected
    tokens = inline(f"A model called {line}, on a base")
    assert {token.type for token in tokens} == {"text"} and shown(tokens) == f"A model called {expected}, on a base"
    heading = markdown.parse(f"# {line}\n\nText\n{line}\n")
    assert [token.type for token in heading if token.level == 0 and token.nesting >= 0] == [
        "heading_open",
        "paragraph_open",
    ]
    assert shown(heading[1].children) == expected
    link = inline(f"[{line}](https://a.org)")
    assert [token.type for token in link if token.type != "text"] == ["link_open", "link_close"] and shown(
        link
    ) == expected
    cells = [token for token in markdown.parse(f"| a | b |\n|---|---|\n| {line} | c |\n") if token.type == "inline"]
    assert [shown(cell.children) for cell in cells] == ["a", "b", expected, "c"]
    assert {token.type for token in cells[2].children} <= {"text"}


@pytest.mark.parametrize("text", HOSTILE + INVISIBLE)
def test_a_code_span_shows_the_text(text):
    """As code, or as text where it holds a bar; alone and in a cell."""
    expected = plain(text)
    tokens = inline(f"Run {code_span(text)} now")
    assert {token.type for token in tokens} <= {"text", "code_inline"} and shown(tokens) == f"Run {expected} now"
    cells = [t for t in markdown.parse(f"| a | b |\n|---|---|\n| {code_span(text)} | c |\n") if t.type == "inline"]
    assert [shown(cell.children) for cell in cells] == ["a", "b", expected, "c"]


@pytest.mark.parametrize("text", HOSTILE + INVISIBLE)
def test_code_means_the_text(text):
    """A string of Python, a block of code and YAML give it back, to the character."""
    block = f"image = f({python_string(text)})"
    (call,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert call.value == text and "\n" not in block and "```" not in block and block.isprintable()
    content = {"a": text, text: [text, 1e-5, 10, True, None]}
    written = yaml_text(content)
    tokens = markdown.parse(f"{fenced(written, 'yaml')}\n\n{fenced(block, 'python')}\n\nText\n")
    assert [token.type for token in tokens] == ["fence", "fence", "paragraph_open", "inline", "paragraph_close"]
    assert yaml.safe_load(tokens[0].content) == content and tokens[1].content == f"{block}\n"
    assert written.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "name",
    ["stable-diffusion-v1-5/stable-diffusion-v1-5", "black-forest-labs/FLUX.1-dev", "user/sd15_iapo", "1e-05", "-0.5", "rewards/chosen", "0.1.0",
     "', '", "a red bicycle (new), 12:30"],
)  # fmt: skip
def test_ordinary_text_is_readable_in_the_source(name):
    """It is written as it is."""
    assert one_line(name) == name


def test_lines_by_hand():
    """Each rule once."""
    assert one_line("a_b _c_ *d* [e](f) <g> \\ $") == r"a_b \_c\_ \*d\* \[e\](f) &lt;g&gt; &#92; &#36;"
    assert one_line("# a | b\n- c") == r"\# a \| b - c"
    assert one_line("- a") == "&#45; a" and one_line("1. a") == "&#49;. a"
    assert one_line("see https://a.org or www.a.org :ok:") == "see https&#58;//a.org or www&#46;a.org &#58;ok:"
    assert with_code("`unet` of `a|b` and `") == "\\`unet\\` of \\`a\\|b\\` and \\`"
    assert with_code("`unet` while *training*") == r"`unet` while \*training\*"
    assert shortened("abcdef", 4) == "abc…" and shortened("a  b", 4) == "a b"


@pytest.mark.parametrize("name", ["user/model", "model"])
def test_links_to_the_hub(name):
    """A name that a repository can have is a link, any other is text."""
    assert hub_link(name) == f"[{name}](https://huggingface.co/{name})"
    assert hub_link(name, "dataset") == f"[{name}](https://huggingface.co/datasets/{name})"


@pytest.mark.parametrize(
    "name", ["a/b/c", "a b", "a](https://evil.org)", "../a", "/home/me/model", "a--b", "x" * 200, "<a>", "é/é"]
)
def test_what_is_no_repository_is_no_link(name):
    assert {token.type for token in inline(f"On {hub_link(name)}.")} == {"text"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://wandb.ai/me/project/runs/1?a=b&c=d#e", "https://wandb.ai/me/project/runs/1?a=b&c=d#e"),
        ("https://a.org/x) [b](c", "https://a.org/x%29%20%5Bb%5D%28c"),
        ("https://a.org/\"><script>", "https://a.org/%22%3E%3Cscript%3E"),
        ("javascript:alert(1)", None),
        ("file:///etc/passwd", None),
        ("https://", None),
        ("http://[", None),
        ("", None),
        ("runs/1", None),
    ],
)  # fmt: skip
def test_addresses(url, expected):
    """Only an address of the web is one, and it cannot end its link."""
    assert address(url) == expected


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd.png", "../a.png", "images/../../a.png", "https://evil.org/a.png", "data:x", "a\\b.png", "", None],
)
def test_pictures_lie_beside_the_card(path):
    assert not is_beside(path) and picture(path, "a") is None


def test_a_picture():
    assert picture("images/a (1).png", "a [b]") == r"![a \[b\]](images/a%20%281%29.png)"
