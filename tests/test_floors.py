"""Imports point down only, and reading a record never loads TensorFlow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trainrt"

FOLDERS = {"record", "update", "loop", "passport", "looks", "device", "endurance", "distribution"}
"""Their modules have floors of their own; of any other folder the whole has one."""

FLOORS = (
    {"vocabulary", "digits", "signals", "phases", "intervals", "launch", "banners"},
    {"statistics", "events", "synthetic", "digest", "relation", "windows"},
    {"reading"},
    {"event_files", "columns"},
    {"checkpoint", "run", "doors", "native", "clip", "taps", "resident", "matched", "survey", "pipeline"},
    {"findings", "adaptive", "tap", "native_ops", "bits", "forward", "words", "trace_reading", "cuda"},
    {"parity", "audit", "moments"},
    {"sparse"},
    {"fused", "comparison", "anatomy", "trace"},
    {"generic"},
    {"origin"},
    {"observer", "reference"},
    {"determinism", "position", "poison"},
    {"replicas"},
    {"sinks", "step", "batches", "environment", "pace", "stopping", "look", "timing", "telemetry", "retracing"},
    {"recorder", "arguments", "probe"},
    {"journal"},
    {"resume"},
    {"lockstep"},
    {"training"},
    {"experiment"},
    {"fit"},
    {"plugin", "demo", "doctor", "report"},
    {"cli"},
    {"__main__"},
)
READING = {
    "vocabulary",
    "statistics",
    "events",
    "reading",
    "synthetic",
    "digest",
    "columns",
    "event_files",
    "run",
    "bits",
    "findings",
    "comparison",
    "plugin",
    "digits",
    "phases",
    "words",
}
LAZY = "__init__"


def _unit(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[-1] if parts[0] in FOLDERS else parts[0]


def _modules():
    empty = {PACKAGE / "__init__.py", *(PACKAGE / folder / "__init__.py" for folder in FOLDERS)}
    return [p for p in PACKAGE.rglob("*.py") if "_kernels" not in p.parts and p not in empty]


def _floor(unit: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if unit in floor)


def _imports(path: Path) -> set[str]:
    """The units of trainrt, and other top-level packages, that a file imports anywhere in it."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module]
            if node.module in ("trainrt", *(f"trainrt.{folder}" for folder in FOLDERS)):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            deep = len(parts) > 2 and parts[1] in FOLDERS
            found.add(parts[2 if deep else 1] if parts[0] == "trainrt" and len(parts) > 1 else parts[0])
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_import_points_down(path):
    here = _floor(_unit(path))
    units = {unit for floor in FLOORS for unit in floor}
    above = {u for u in _imports(path) & units if u != _unit(path) and _floor(u) >= here}
    assert not above, f"{_unit(path)} is on floor {here} and imports {above}"


@pytest.mark.parametrize(
    "path", [p for p in _modules() if _unit(p) in READING], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_reading_wing_names_no_tensorflow(path):
    assert not _imports(path) & {"tensorflow", "keras"}


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_doors_and_what_was_matched_know_private_names_of_keras(path):
    if _unit(path) in ("doors", "fused", "matched"):
        return
    assert "keras.src" not in path.read_text()


def _modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import trainrt",
        "import trainrt.record.run",
        "from trainrt import Run, Finding, diagnose",
        "import trainrt.cli",
        "import trainrt; trainrt.Run.synthetic(steps=3)",
    ],
)
def test_reading_leaves_tensorflow_out(code):
    assert not {"tensorflow", "keras"} & _modules_after(code)


def test_importing_trainrt_alone_imports_nothing_else_of_weight():
    assert not {"numpy", "tensorboard", "google.protobuf"} & _modules_after("import trainrt")


def test_editors_know_every_public_name_and_where_it_is_defined():
    import trainrt

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {each.asname: node.module for node in block.body for each in node.names}
    assert told == {name: "trainrt" if home == f"trainrt.{name}" else home for name, home in trainrt._HOME.items()}
