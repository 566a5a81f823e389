# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Builds the documentation as a site of HTML pages, or says what is wrong with it:

    python -m docs.build --output site
"""

import argparse
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.console import nocolor

import trl_diffusion
from docs.pages import SOURCE, Sources


THEME = Path(__file__).parent / "theme"
SETTINGS = {
    "project": "trl_diffusion",
    "release": trl_diffusion.__version__,
    "extensions": ["myst_parser", "docs.mathml"],
    "myst_enable_extensions": ["colon_fence", "deflist"],
    "myst_heading_anchors": 6,
    "html_theme": "furo",
    "html_title": "trl_diffusion",
    "html_static_path": [str(THEME)],
    "html_css_files": ["site.css"],
    "html_math_renderer": "mathml",
    "html_show_copyright": False,
    "html_show_sourcelink": False,
    "html_copy_source": False,
    "html_theme_options": {"top_of_page_buttons": []},
    "highlight_language": "text",
    "nitpicky": True,
    "python_display_short_literal_types": True,
    "python_maximum_signature_line_length": 100,
    "smartquotes": False,
    # A heading may be two levels below the one before it; a second build in one process registers the same nodes again.
    "suppress_warnings": ["myst.header", "app"],
    "toc_object_entries_show_parents": "hide",
}


def build(output: Path, source: Path = SOURCE) -> list[str]:
    """
    Builds the site.

    Args:
        output (`Path`):
            Folder of the site. An earlier site in it is removed.
        source (`Path`, *optional*, defaults to `docs/source`):
            Folder of the pages.

    Returns:
        `list[str]`: what is wrong, nothing if the site is whole.
    """
    nocolor()
    if (output / ".buildinfo").exists():  # an earlier site, whose pages may be gone by now
        shutil.rmtree(output)
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "source"
        sources.mkdir()
        faults = Sources(source).write(sources)
        warnings = io.StringIO()
        site = Sphinx(
            srcdir=sources,
            confdir=None,
            outdir=output,
            doctreedir=Path(folder) / "doctrees",
            buildername="html",
            confoverrides=SETTINGS,
            status=None,
            warning=warnings,
            freshenv=True,
        )
        site.build()
    return faults + re.sub(rf"{re.escape(str(sources.resolve()))}/|WARNING: ", "", warnings.getvalue()).splitlines()


def main() -> int:
    """Builds the site, and fails if anything is wrong with it."""
    parser = argparse.ArgumentParser(description="Builds the documentation as a site of HTML pages.")
    parser.add_argument("--output", type=Path, default=Path("site"), help="Folder of the site. Defaults to site.")
    output = parser.parse_args().output
    faults = build(output.resolve())
    for fault in faults:
        print(fault, file=sys.stderr)  # noqa: T201
    print(f"{len(faults)} faults" if faults else f"Open {output}/index.html")  # noqa: T201
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
