# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Space in a headless Chromium, as a visitor uses it. It needs an environment with the Space's requirements and playwright.

With `--basetemp DIR` the screenshots of the documentation are kept, in `DIR`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from tests.space.conftest import SPACE


pytest.importorskip("gradio", reason="needs gradio: pip install -r examples/space/requirements.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 240  # seconds, on a busy machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def started():
    """The app in a process of its own, as the Hub runs it: its address, its process, and when it was started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SPACE.parents[1]),
    }
    start = time.perf_counter()
    app = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment)
    try:
        wait_until(lambda: app.poll() is not None or answers(port), "the app answers")
        assert app.poll() is None
        yield f"http://127.0.0.1:{port}", psutil.Process(app.pid), start
    finally:
        app.terminate()
        app.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not in {PATIENCE} s: {what}"
        time.sleep(0.1)


class Visitor:
    """
    Somebody who looks at the page.

    Args:
        page ([`playwright.sync_api.Page`]):
            The page.
    """

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def picture(self, name: str) -> bytes:
        """What a picture shows now, as a file; empty while there is none."""
        image = self.page.locator(f"#{name} img").first
        return self.page.request.get(image.get_attribute("src")).body() if image.count() else b""

    def pictures(self) -> list[bytes]:
        return [self.picture(f"image-{number}") for number in range(3)]

    def changes(self, name: str, act: Callable[[], None]) -> bytes:
        """Acts, and waits until a picture is another one."""
        before = self.picture(name)
        act()
        wait_until(lambda: self.picture(name) not in (before, b""), f"{name} changes")
        return self.picture(name)

    def slide(self, name: str, share: float) -> None:
        """Clicks on a slider, at a share of its width."""
        slider = self.page.locator(f"#{name} input[type=range]")
        box = slider.bounding_box()
        slider.click(position={"x": min(max(share * box["width"], 1), box["width"] - 1), "y": box["height"] / 2})

    def choose(self, name: str, text: str) -> None:
        self.page.locator(f"#{name} label", has_text=text).first.click()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def wait_for(self, name: str, text: str) -> None:
        wait_until(lambda: text in self.page.locator(f"#{name}").inner_text(), f"{name} says {text}")

    def keep(self, path) -> None:
        """A screenshot of the whole page, once nothing is loading."""
        self.page.wait_for_timeout(1500)
        self.page.mouse.move(0, 0)
        self.page.screenshot(path=path, full_page=True)


@pytest.fixture
def visitor(started):
    """A visitor of the page, who in the end has seen no error."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 800})
        page.set_default_timeout(1000 * PATIENCE)
        visitor = Visitor(page)
        page.goto(started[0])
        yield visitor
        browser.close()
    assert visitor.errors == []


def test_generate(visitor, started, tmp_path_factory):
    """
    The first picture comes by itself. A prompt and a seed change it; at strength 0 all images are the base's, to the byte; guidance and
    the other world change the aligned one.
    """
    wait_until(lambda: all(visitor.pictures()), "three pictures")
    _, app, start = started
    used = app.cpu_times()
    print(f"First pictures after {time.perf_counter() - start:.1f} s, {used.user + used.system:.1f} s of CPU time")
    base, dpo, iapo = visitor.pictures()
    assert len({base, dpo, iapo}) > 1
    visitor.changes("image-0", lambda: visitor.page.get_by_text("a blue square and a red triangle").click())
    visitor.page.locator("#seed input").fill("1")
    visitor.changes("image-0", lambda: visitor.page.locator("#generate").click())
    wait_until(lambda: len(set(visitor.pictures())) > 1, "the images differ")
    visitor.keep(tmp_path_factory.getbasetemp() / "space_generate.png")

    aligned = visitor.picture("image-2")
    visitor.changes("image-2", lambda: visitor.slide("scale", 0))
    wait_until(lambda: len(set(visitor.pictures())) == 1, "all images are the base's")
    visitor.changes("image-2", lambda: visitor.slide("scale", 2 / 3))
    wait_until(lambda: visitor.picture("image-2") == aligned, "the image of strength 1 comes back")
    visitor.changes("image-2", lambda: visitor.page.locator("#npo input").check())

    visitor.changes("image-2", lambda: visitor.choose("world", "Paintings"))
    visitor.wait_for("image-2", "CPO")
    assert visitor.page.locator("#prompt textarea, #prompt input").input_value() == "a red circle"


def test_data(visitor, tmp_path_factory):
    """A pair opens, its masks cover the images, and the tree can be walked down to an attribute and up again."""
    visitor.open("Look at the data")
    visitor.wait_for("verdicts", "better in the chosen image")
    title = visitor.page.locator("#pair-title").inner_text()
    visitor.changes("chosen", lambda: visitor.page.locator("#pairs button.thumbnail-lg").nth(2).click())
    wait_until(lambda: visitor.page.locator("#pair-title").inner_text() != title, "the title changes")
    visitor.changes("rejected", lambda: visitor.choose("pair-mode", "Masks"))
    visitor.wait_for("verdicts", "contradicts")

    visitor.changes("branch", lambda: visitor.choose("down", "light"))
    visitor.wait_for("place", "light")
    visitor.choose("down", "ground")  # the only attribute there, so the picture stays
    visitor.wait_for("place", "Whether the ground is light")
    visitor.wait_for("positive-paintings", "bright")
    visitor.wait_for("negative-paintings", "murky")
    visitor.keep(tmp_path_factory.getbasetemp() / "space_data.png")
    visitor.page.locator("#up").click()
    visitor.wait_for("down", "ground")
    visitor.changes("branch", lambda: visitor.page.locator("#up").click())
    visitor.wait_for("place", "4 attributes")


def test_training(visitor, tmp_path_factory):
    """Another training has other curves; the slider shows its samples of other steps."""
    visitor.open("Look at a training")
    wait_until(lambda: visitor.picture("curves") and visitor.picture("samples"), "curves and samples")

    def choose():
        visitor.page.locator("#training input").click()
        visitor.page.get_by_role("option", name="Scenes, IAPO").click()

    visitor.changes("curves", choose)
    last = visitor.picture("samples")
    visitor.keep(tmp_path_factory.getbasetemp() / "space_training.png")
    assert visitor.changes("samples", lambda: visitor.slide("step", 0)) != last
