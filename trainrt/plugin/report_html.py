"""`trainrt report --html`: the page of the TensorBoard plugin as one file that opens from disk.

It holds the same drawing modules, and pictures of the whole run in place of a server's answers. Nothing is fetched.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from trainrt.plugin import answers, files, summary, tables, wire
from trainrt.record.run import Run

STATISTICS = (
    "update_ratio", "gradient_norm", "clipped_gradient_norm", "update_norm", "weight_norm", "gradient_ratio",
    "effective_learning_rate", "unchanged_share", "rounded_share", "gradient_zero_share", "gradient_nonfinite_share",
    "clip_share", "gradient_peak_norm", "gradient_trough_norm", "update_peak_norm", "update_trough_norm",
    "weight_peak_norm", "weight_trough_norm", "distance_norm",
)  # fmt: skip
"""What a report holds of each layer, with the norms of the slots; TensorBoard shows the rest."""

PICTURE_BYTES = 6 << 20
"""Of all pictures of a run before compression: the more layers, the fewer columns."""

PAIRS = 45
"""Of so many pairs of runs a report holds the comparison, all pairs of ten runs: each takes a second or so."""

_IMPORT = re.compile(r"(from|import) '\./([\w.-]+\.js)'")
_POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"


def build(runs: Sequence[tuple[str, Run]], title: str = "Training report", compare: bool = False) -> str:
    """The page for one or more runs.

    Args:
      runs: Their names, which the page shows, and the runs; the first is opened first.
      title: Title of the page.
      compare: The page opens with the other runs compared to the first.

    Returns:
      A whole HTML document.
    """
    content: dict = {"names": [name for name, _ in runs], "runs": {}, "pictures": {}, "compared": {}}
    if compare:
        content["versus"] = [name for name, _ in runs[1:]]
    found: dict[str, list] = {}
    for name, run in runs:
        findings = found[name] = summary.Judge().findings(run, whole=True)
        told = summary.summary(name, run, findings)
        told["rows"] = {"layers": told["rows"]["layers"]}
        held = [n for n in (*STATISTICS, *_of_slots(run)) if n in run.statistics]
        told["statistics"] = [one for one in told["statistics"] if one["name"] in held]
        content["runs"][name] = told
        if len(run):
            pictures = _pictures(run, held)
            content["pictures"] |= {f"{name}\n{what}": _text(data) for what, data in pictures.items()}
    for (name, run), (other, versus) in itertools.islice(itertools.combinations(runs, 2), PAIRS):
        content["compared"][f"{name}\n{other}"] = answers.compared(run, versus, found[name], found[other])
    return _document(content, title)


def write(path: Path, runs: Sequence[tuple[str, Run]], compare: bool = False) -> None:
    """Writes the page to a file. `compare`: it opens with the others compared to the first.

    Raises:
      OSError: The file cannot be written.
    """
    path.write_text(build(runs, compare=compare), encoding="utf-8")


def _of_slots(run: Run) -> list[str]:
    return [f"{slot}_{part}" for slot in run.roster.slots for part in ("norm", "peak_norm", "trough_norm")]


def _pictures(run: Run, names: list[str]) -> dict[str, bytes]:
    kept = tables.Tables(run)
    cells = 7 * len(names) * max(len(kept.rows("layers")), 1)
    count = min(max(PICTURE_BYTES // cells, 60), answers.MOST_COLUMNS)
    cut = tables.columns(run.steps, int(run.steps[0, 0]), int(run.steps[-1, 1]), count)
    pictures = {"scalars": answers.scalar_lines(kept, cut)}
    kept.get("layers", names)
    return pictures | {name: answers.picture(kept, "layers", name, cut) for name in names}


def _text(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _document(content: dict, title: str) -> str:
    own = files.static_files()
    modules = {
        f"trainrt/{name}": "data:text/javascript;base64,"
        + base64.b64encode(_IMPORT.sub(r"\1 'trainrt/\2'", data.decode()).encode()).decode()
        for name, data in own.items()
        if name.endswith(".js") and name != "index.js"
    }
    start = (
        "import { embedded } from 'trainrt/embedded.js'; import { mount } from 'trainrt/page.js';\n"
        "const content = JSON.parse(document.getElementById('content').textContent);\n"
        "mount(document.body, await embedded(content));"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{own["style.css"].decode()}</style>
<script type="importmap">{_script(json.dumps({"imports": modules}))}</script>
<script type="application/json" id="content">{_script(wire.dumps(content))}</script>
</head>
<body>
<noscript>This page draws its charts with JavaScript. The same findings as text: trainrt report LOGDIR.</noscript>
<script type="module">{start}</script>
</body>
</html>
"""


def _script(text: str) -> str:
    """JSON that no name in it can end the element of: `<` is written as an escape."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
