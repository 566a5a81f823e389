# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Runs the notebooks from top to bottom and keeps what they show.

```bash
python -m examples.notebooks                # all of them
python -m examples.notebooks iapo annotate  # some
```

The `.ipynb` files are the source: edit them in Jupyter, then run this. It needs the extra `notebooks`.
"""

import argparse
import base64
import io
import os
import re
import time
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import PIL.Image
from nbclient import NotebookClient
from nbformat import NotebookNode

from trl_diffusion.machine import without_places


REPOSITORY = "user/trl_diffusion"  # at GitHub. There is no public address yet: put it here, and run this
FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PNG_BYTES = 150_000  # above it, a picture gets 256 colours
TIMES = re.compile(r" *\d*:?\d\d:\d\d( < \d*:?\d\d:\d\d)?,?")  # in the progress of a training
MEMORY = re.compile(r" at 0x[0-9A-Fa-f]+")  # where an object is in memory
# What libraries say about the environment that a notebook is run in, by parts of it
OF_ENVIRONMENT = ("TqdmWarning: IProgress not found", "Failed to load CPU gemm_4bit_forward")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars are nothing to keep


def badge(name: str) -> str:
    """The badge that opens a notebook in Colab, as Markdown."""
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/examples/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def heading(name: str) -> str:
    """What stands below the title of a notebook."""
    install = f'%pip install -q "trl-diffusion[notebooks] @ git+https://github.com/{REPOSITORY}"'
    return f"{badge(name)}\n\nOn Colab, first run `{install}`."


def run(notebook: NotebookNode, folder: str | Path, environment: dict[str, str]) -> NotebookNode:
    """
    Runs a notebook from top to bottom, in a process of its own.

    Args:
        notebook (`NotebookNode`):
            The notebook, which is given its outputs.
        folder (`str` or `Path`):
            Where it runs, and writes.
        environment (`dict[str, str]`):
            The environment of its process.

    Returns:
        `NotebookNode`: the same notebook.

    Raises:
        `nbclient.exceptions.CellExecutionError`: If a cell raises an error.
    """
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env=environment | QUIET)


def clean(notebook: NotebookNode, name: str) -> NotebookNode:
    """
    Takes out of a notebook what differs from run to run and from machine to machine, and writes its heading.

    Args:
        notebook (`NotebookNode`):
            The notebook, which is changed.
        name (`str`):
            Its name.

    Returns:
        `NotebookNode`: the same notebook.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    title = notebook.cells[0].source.split("\n")[0]
    notebook.cells[0].source = f"{title}\n\n{heading(name)}"
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := clean_output(output)) is not None]
    return notebook


def clean_output(output: NotebookNode) -> NotebookNode | None:
    """An output without places, times and colours that nobody sees; `None` if nothing is left."""
    if output.output_type == "stream":
        if output.name == "stderr" and any(part in output.text for part in OF_ENVIRONMENT):
            return None
        output.text = without_places(output.text)
        return output if output.text.strip() else None
    if output.output_type == "error":
        return output
    output.metadata = {}
    if "image/png" in output.data:
        output.data.pop("image/jpeg", None)  # PIL shows the same image as both
    for kind, content in output.data.items():
        if kind == "image/png":
            output.data[kind] = small_png(content)
        elif kind == "text/plain":
            output.data[kind] = without_places(MEMORY.sub("", content))
        elif kind == "text/html":  # no place is looked for in pictures that it holds
            output.data[kind] = TIMES.sub("", content)
    return output


def small_png(content: str) -> str:
    """A PNG file in base64, optimised, and with 256 colours where it is large."""
    image = PIL.Image.open(io.BytesIO(base64.b64decode(content)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_BYTES:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def first_picture(notebook: NotebookNode) -> str:
    """When the first picture was there, after the start of the first cell: what nbclient noted in the metadata of cells."""
    times = [cell.metadata.execution for cell in notebook.cells if cell.cell_type == "code"]
    shown = next(
        cell.metadata.execution
        for cell in notebook.cells
        if cell.cell_type == "code" and any("image/png" in str(output) for output in cell.outputs)
    )
    start, end = (
        datetime.fromisoformat(each) for each in (times[0]["iopub.execute_input"], shown["shell.execute_reply"])
    )
    return f"{(end - start).total_seconds():.0f} s"


def cpu_seconds() -> float:
    """Seconds of CPU that finished processes of this one have used."""
    used = os.times()
    return used.children_user + used.children_system


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.notebooks", description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Which: {', '.join(NOTEBOOKS)}. Defaults to all.")
    names = parser.parse_args().names or NOTEBOOKS
    if unknown := sorted({*names} - {*NOTEBOOKS}):
        parser.error(f"There is no notebook {', '.join(unknown)}. There are {', '.join(NOTEBOOKS)}.")
    for name in names:
        path, start, before = FOLDER / f"{name}.ipynb", time.perf_counter(), cpu_seconds()
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as folder:
            run(notebook, folder, {**os.environ})
        seconds, first = time.perf_counter() - start, first_picture(notebook)
        nbformat.write(clean(notebook, name), path)
        print(
            f"{name}: {seconds:.0f} s, {cpu_seconds() - before:.0f} s of CPU; the first picture after {first}",
            flush=True,
        )


if __name__ == "__main__":
    main()
