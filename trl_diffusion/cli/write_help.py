# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Writes `help.json` anew, after a change of flags or of the versions in `constraints.txt`:

```bash
python -m trl_diffusion.cli.write_help
```
"""

import json

from ..files import write_file
from .help import SHIPPED, page_of, versions
from .main import COMMANDS, script_of
from .script import parser_of


def write_help() -> None:
    """Asks the parser of every command."""
    pages = {command: page_of(parser_of(command, script_of(command))) for command in COMMANDS}
    content = json.dumps({"versions": versions(), "pages": pages}, indent=1, ensure_ascii=False) + "\n"
    write_file(SHIPPED, content.encode())


if __name__ == "__main__":
    write_help()
