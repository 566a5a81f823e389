# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Turns the pages, which are in the format of Hugging Face's doc-builder, into a tree of sources for Sphinx."""

import re
import shutil
from pathlib import Path

import yaml
from PIL import Image

from docs.laws import page_faults
from docs.notebooks import notebook_markdown
from docs.reference import Reference, outside_code


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "source"
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".sh": "bash",
    ".cff": "yaml",
    ".toml": "toml",
}
LONGEST_FILE = 100_000  # characters of a file that is shown; a longer one can be downloaded
LINK = re.compile(r"(!\[[^\]]*\]\(|\]\()([^)\s]+)\)")  # a picture, or the end of a link, whose text may hold a picture
NOT_SEARCHED = "---\norphan: true\nnosearch: true\n---\n\n"


class Sources:
    """
    The sources of the site: the pages, and each file of the repository that a page links to.

    Attributes:
        faults (`list[str]`):
            What is wrong, each with the page.

    Args:
        source (`Path`):
            Folder with the pages and `_toctree.yml`.
    """

    def __init__(self, source: Path = SOURCE):
        self.source = source
        self.pages = {path.stem: path.read_text(encoding="utf-8") for path in sorted(source.glob("*.md"))}
        self.reference = Reference(self.pages)
        self.faults = [*self.reference.faults, *page_faults(self.pages)]
        self.files: list[Path] = []

    def write(self, folder: Path) -> list[str]:
        """
        Writes the sources.

        Args:
            folder (`Path`):
                An empty folder.

        Returns:
            `list[str]`: what is wrong with the pages, nothing if all is well.
        """
        contents = self.contents()
        for name, text in self.pages.items():
            text = self.markdown(self.reference.expand(text), self.source / f"{name}.md", folder)
            (folder / f"{name}.md").write_text(text + (contents if name == "index" else ""), encoding="utf-8")
        for path in self.files:  # grows while it is read: a file may link to others
            self.write_file(path, folder)
        self.faults += [fault for fault in self.reference.faults if fault not in self.faults]
        return self.faults

    def contents(self) -> str:
        """The table of contents of `_toctree.yml` for Sphinx."""
        parts = yaml.safe_load((self.source / "_toctree.yml").read_text(encoding="utf-8"))
        listed = [entry["local"] for part in parts for entry in part["sections"]]
        for name in sorted(set(listed) ^ set(self.pages)):
            self.faults.append(
                f"_toctree.yml: there is no page `{name}.md`."
                if name in listed
                else f"_toctree.yml: `{name}` is missing."
            )
        text = ""
        for part in parts:
            entries = [
                f"{entry['title']} <{entry['local']}>" for entry in part["sections"] if entry["local"] != "index"
            ]
            text += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {part['title']}", "", *entries, "```"])
        return text

    def markdown(self, text: str, path: Path, folder: Path) -> str:
        """A page, or another Markdown file, as MyST reads it."""

        def change(part: str) -> str:
            part = re.sub(r"\\\\\((.+?)\\\\\)", lambda found: f"{{math}}`{found[1].strip()}`", part, flags=re.DOTALL)
            part = re.sub(r"^\$\$\n(.*?)^\$\$$", r"```{math}\n\1```", part, flags=re.DOTALL | re.MULTILINE)
            part = re.sub(
                r"^( *)<Tip( warning=\{true\})?>\s*?\n(.*?)\n *</Tip>", tip, part, flags=re.DOTALL | re.MULTILINE
            )
            part = re.sub(r"^> \[!(NOTE|TIP|WARNING)\]\n((?:>.*\n?)*)", alert, part, flags=re.MULTILINE)
            return LINK.sub(lambda found: self.link(found[1], found[2], path, folder), part)

        text = outside_code(text, change)
        if path.parent == self.source:
            text = self.reference.references(text, None, path.name)
        return text

    def link(self, start: str, target: str, path: Path, folder: Path) -> str:
        """A link or a picture, to where its target is in the site."""
        if re.match(r"https?://|mailto:|#", target):
            return f"{start}{target})"
        name, _, anchor = target.partition("#")
        found = (path.parent / (f"{name}.md" if name in self.pages else name)).resolve()
        if not (found.exists() and (found.is_relative_to(ROOT) or found.is_relative_to(self.source))):
            self.faults.append(f"{path.name}: there is no file `{target}`; correct the link.")
            return f"{start}{target})"
        anchor = f"#{anchor}" if anchor else ""
        if found.parent == self.source and found.suffix == ".md":
            return f"{start}/{found.name}{anchor})"
        inside = found.relative_to(self.source if found.is_relative_to(self.source) else ROOT)
        if start.startswith("!"):
            if not is_picture(found):
                self.faults.append(f"{path.name}: `{target}` is no picture that can be shown; make it again.")
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, folder / inside)
            return f"{start}/{inside})"
        if found not in self.files:
            self.files.append(found)
        if is_shown(found):
            return f"{start}/files/{inside}.md{anchor})"
        return f"{start}/files/{inside})"

    def write_file(self, path: Path, folder: Path) -> None:
        """A file of the repository: as a page where it can be read, else to be downloaded."""
        inside = path.relative_to(self.source if path.is_relative_to(self.source) else ROOT)
        target = folder / "files" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_shown(path):
            shutil.copyfile(path, target)
            return
        if path.is_dir():
            names = "".join(
                f"- `{child.name}`\n" for child in sorted(path.iterdir()) if not child.name.startswith("__")
            )
            text = f"# {inside}\n\n{names}"
        elif path.suffix == ".ipynb":
            text = notebook_markdown(
                path, target.with_suffix(".pictures"), lambda text: self.markdown(text, path, folder)
            )
        elif path.parent == ROOT and path.suffix == ".md":
            text = self.markdown(path.read_text(encoding="utf-8"), path, folder)
        else:
            code = path.read_text(encoding="utf-8").rstrip()
            text = f"# {inside.name}\n\n`{inside}`\n\n``````{LANGUAGES.get(path.suffix, 'text')}\n{code}\n``````\n"
        target.with_name(f"{target.name}.md").write_text(NOT_SEARCHED + text, encoding="utf-8")


def is_shown(path: Path) -> bool:
    """Whether a file is a page of the site: a folder, or text that is not too long."""
    if path.is_dir() or path.suffix == ".ipynb":
        return True
    return path.suffix in (*LANGUAGES, ".md", ".txt") and path.stat().st_size <= LONGEST_FILE


def is_picture(path: Path) -> bool:
    """Whether a file is a whole picture. What is drawn as text, SVG, is not read."""
    if path.suffix == ".svg":
        return True
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError):  # what Pillow raises for a damaged PNG
        return False
    return True


def tip(found: re.Match) -> str:
    indent, warning, text = found.groups()
    return f"{indent}:::{{{'warning' if warning else 'tip'}}}\n{text}\n{indent}:::"


def alert(found: re.Match) -> str:
    text = re.sub(r"^> ?", "", found[2], flags=re.MULTILINE).strip()
    return f":::{{{found[1].lower()}}}\n{text}\n:::\n"
