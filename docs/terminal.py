"""Draws what `trainrt report` prints of a run as `terminal.svg`: `python docs/terminal.py trainrt-demo/stagnating`."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH = 92


def draw(arguments: list[str]) -> str:
    """The command and its output, as a terminal shows them; the picture asks nobody for a font."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "trainrt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "dim"), (f"trainrt {' '.join(arguments)}", "bold")))
    console.print(Text.from_ansi(done.stdout.rstrip()))
    own = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="trainrt", code_format=own, unique_id="trainrt")


if __name__ == "__main__":
    Path(__file__).with_name("terminal.svg").write_text(draw(["report", *sys.argv[1:]]))
