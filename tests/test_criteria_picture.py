# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from PIL import Image

from trl_diffusion.cli.main import main
from trl_diffusion.criteria import Attribute, Criteria
from trl_diffusion.criteria_picture import (
    BAND_COLOR,
    MARGIN,
    NEGATIVE_COLOR,
    PADDING,
    POSITIVE_COLOR,
    STRIPE_COLOR,
    TEXT_WIDTH,
    criteria_picture,
)


def tree(dimensions: dict[str, int], above: tuple[str, ...] = (), words: int = 2) -> Criteria:
    """A tree with the given numbers of attributes per dimension and of words per form, with nodes in between."""
    attributes = tuple(
        Attribute(
            f"{dimension}_{i}",
            (dimension, *(f"{dimension}_{node}" for node in above)),
            " ".join(["lit"] * words),
            " ".join(["dim"] * words),
            "?",
        )
        for dimension, count in dimensions.items()
        for i in range(count)
    )
    return Criteria("tree", tuple(f"level_{depth}" for depth in range(len(above) + 2)), attributes)


CRITERIA = {
    "painting": Criteria.load("painting"),
    "4 attributes at depth 2": tree({"light": 2, "color": 2}),
    "one dimension": tree({"light": 3}, ("aspect", "theme")),
    "one attribute": tree({"light": 1}),
    "uneven": tree({"light": 30, "color": 1, "line": 2, "form": 1, "space": 1}),
    "deep": tree({"light": 2, "color": 2}, tuple(f"node_{depth}" for depth in range(9))),
    "long forms": tree({"light": 2, "color": 2}, ("aspect",), words=60),
    "long words": Criteria(
        "t" * 90, ("dimension", "attribute"), (Attribute("a", ("d" * 90,), "p" * 90, "n" * 90, "?"),)
    ),
    "dimensions that are attributes": Criteria(
        "flat", ("dimension",), tuple(Attribute(id, (), "lit", "dim", "?") for id in ("light", "color", "line"))
    ),
}


def is_color(image: np.ndarray, *colors: tuple[int, int, int]) -> np.ndarray:
    return np.any([(image == color).all(axis=-1) for color in colors], axis=0)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of true values."""
    changes = np.flatnonzero(np.diff(np.pad(mask.astype(int), 1)))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def panels(image: np.ndarray) -> list[np.ndarray]:
    """The panels, row by row. The first row of the grid is complete, and bands have no letters on their edges."""
    columns = runs(is_color(image[MARGIN], BAND_COLOR))
    tops = [top for top, _ in runs(is_color(image[:, MARGIN], BAND_COLOR))]
    places = [(top, bottom, *column) for top, bottom in zip(tops, [*tops[1:], len(image)]) for column in columns]
    return [
        image[top:bottom, left:right] for top, bottom, left, right in places if is_color(image[top, left], BAND_COLOR)
    ]


@pytest.fixture(scope="module", params=CRITERIA)
def case(request) -> tuple[Criteria, np.ndarray]:
    criteria = CRITERIA[request.param]
    return criteria, np.array(criteria_picture(criteria))


def test_every_attribute_is_drawn(case):
    """There is an overview and a panel for each dimension, with a stripe of green and red letters for each
    attribute."""
    criteria, image = case
    overview, *dimensions = panels(image)
    assert len(dimensions) == len(criteria.dimensions)
    for panel, count in zip([overview, *dimensions], [1, *criteria.counts().values()], strict=True):
        stripes = runs(is_color(panel[:, -1], STRIPE_COLOR))
        assert len(stripes) == count
        for top, bottom in stripes:
            green = is_color(panel[top:bottom], POSITIVE_COLOR).any(axis=0).nonzero()[0]
            red = is_color(panel[top:bottom], NEGATIVE_COLOR).any(axis=0).nonzero()[0]
            assert green.size and red.size and green.max() < red.min()


def test_nothing_is_cut_off(case):
    """The border is white, and letters keep a distance from the right side of their panel."""
    _, image = case
    for border in (image[:MARGIN], image[-MARGIN:], image[:, :MARGIN], image[:, -MARGIN:]):
        assert (border == 255).all()
    for panel in panels(image):
        assert is_color(panel[:, -PADDING // 2 :], BAND_COLOR, STRIPE_COLOR, (255, 255, 255)).all()


def test_panels_do_not_touch(case):
    """All panels have the same width, with white space between and below them."""
    _, image = case
    columns = runs(is_color(image[MARGIN], BAND_COLOR))
    assert len({right - left for left, right in columns}) == 1
    for (_, left), (right, _) in zip(columns, columns[1:]):
        assert right - left > PADDING and (image[:, left:right] == 255).all()
    tops = [top for top, _ in runs(is_color(image[:, MARGIN], BAND_COLOR))]
    for top in tops[1:]:
        assert (image[top - PADDING : top] == 255).all()


def test_the_shipped_tree_fits_a_poster():
    """The eight panels of the painting tree fill a grid of four by two, which is not much higher than wide."""
    image = criteria_picture(CRITERIA["painting"])
    assert len(panels(np.array(image))) == 8
    assert len(runs(is_color(np.array(image)[MARGIN], BAND_COLOR))) == 4
    assert 1 / 1.5 < image.width / image.height < 1.5


def test_long_forms_go_on_in_the_next_line():
    """Ten times as many words make the picture higher, but not wider than two columns of text per panel."""
    short, long = (criteria_picture(tree({"light": 1}, words=words)) for words in (30, 300))
    assert long.height > 2 * short.height
    assert long.width == short.width
    assert len(panels(np.array(long))[0][0]) < 2 * TEXT_WIDTH + 4 * PADDING


@pytest.mark.parametrize("criteria", CRITERIA.values(), ids=CRITERIA)
def test_the_text_has_a_line_for_each_node(criteria, capsys, monkeypatch):
    """`show-criteria` prints every node, indented by depth, with the forms of attributes, and then the counts."""
    monkeypatch.setattr(Criteria, "load", lambda name: criteria)
    assert main(["show-criteria"]) == 0
    nodes, counts = capsys.readouterr().out.rstrip("\n").split("\n\n")
    nodes = nodes.split("\n")
    assert [((len(line) - len(line.lstrip())) // 2, line.split(":")[0].strip()) for line in nodes] == [
        (depth, node) for depth, node, _ in criteria.walk()
    ]
    assert [line.strip() for line in nodes if " | " in line] == [
        f"{attribute.id}: {attribute.positive} | {attribute.negative}" for attribute in criteria.attributes
    ]
    counts = dict(line.split() for line in counts.split("\n")[1:])
    assert {name: int(count) for name, count in counts.items()} == {
        **criteria.counts(),
        "total": len(criteria.attributes),
    }


def test_one_dimension_of_a_file(tmp_path, capsys):
    """`--dimension` prints and draws one dimension of a user's tree, and creates the folder of the picture."""
    leaf = "{positive: lit, negative: dim, definition: Whether it is.}"
    (tmp_path / "tree.yaml").write_text(
        "name: mine\nlevels: [dimension, attribute]\n"
        f"tree:\n  light: {{sun: {leaf}, lamp: {leaf}}}\n  color: {{hue: {leaf}}}\n"
    )
    output = tmp_path / "pictures" / "light.png"
    flags = ["--criteria", str(tmp_path / "tree.yaml"), "--dimension", "light", "--output", str(output)]
    assert main(["show-criteria", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("light\n  sun: lit | dim\n  lamp: lit | dim\n\nAttributes of mine:\n")
    assert "hue" not in out and out.endswith(f"Drew the tree to {output}.\n")
    assert len(panels(np.array(Image.open(output)))) == 2


def test_an_unknown_dimension_is_refused(capsys):
    """The message names the existing dimensions."""
    assert main(["show-criteria", "--dimension", "colour"]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "'colour'" in captured.err
    assert all(dimension in captured.err for dimension in CRITERIA["painting"].dimensions)
