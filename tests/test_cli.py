"""The command line: what it prints of runs that are whole, damaged or missing, and what it must not import."""

import json
import subprocess
import sys

import numpy as np
import pytest

from trainrt import __version__, findings
from trainrt.cli import BAD_INPUT, main
from trainrt.findings import diagnose
from trainrt.record import events
from trainrt.record.run import Run
from trainrt.record.vocabulary import Epoch, Parameter, Record
from trainrt.report import summary

STEPS = 60
ENVIRONMENT = {
    "model": {"name": "[bold]net[/]"},
    "optimizer": {"name": "sgd", "class": "SGD", "config": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": False}},
    "fit": {"clip": "GlobalNorm(0.0001)"},
}


def strangled():
    return Run.synthetic(
        STEPS,
        [Parameter("net/kernel", "net", (8, 8), "float32")],
        update_ratio=1e-6,
        clip_scale=1e-4,
        loss=np.linspace(2.30, 2.28, STEPS),
        scalars={"gradient_norm": 1.0},
    )


def healthy():
    return Run.synthetic(STEPS, [Parameter("net/kernel", "net", (8, 8), "float32")], update_ratio=1e-3)


def write(directory, run, start=1_700_000_000.0, end="finished", environment=ENVIRONMENT):
    """Writes a run as `trainrt.fit` does; returns its event file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / events.file_name(start)
    made = [
        events.encode_header(start),
        events.encode_roster(run.roster, environment, start),
        events.encode_record(Record.concatenate(run._chunks), run.roster),
        events.encode_epoch(Epoch(0, STEPS - 1, {"loss": 2.29, "accuracy": 0.1}), start),
    ]
    if end:
        made.append(events.encode_end(end, step=STEPS - 1))
    path.write_bytes(b"".join(map(events.frame, made)))
    return path


def test_report_prints_the_run_and_its_findings(tmp_path, capsys):
    write(tmp_path / "a", strangled())
    assert main(["report", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "[bold]net[/], 1 trainable weights, 64 elements",
        "SGD(learning_rate=0.05, momentum=0.9)",
        "GlobalNorm(0.0001)",
        "steps 0 to 59, in 60 windows",
        "loss 2.3 -> 2.28",
        "accuracy 0.1",
        "ended finished",
        "ERROR learning_rate: clip_too_tight (steps 0 to 59)",
        "where net/kernel",
        "try trainrt.fit(..., clip=1)",
    ):
        assert part in out


def test_report_of_a_healthy_run_says_so(tmp_path, capsys):
    write(tmp_path, healthy())
    assert main(["report", str(tmp_path)]) == 0
    assert "No findings" in capsys.readouterr().out


def test_json_holds_what_diagnose_finds(tmp_path, capsys):
    path = write(tmp_path, strangled())
    assert main(["report", "--json", str(tmp_path)]) == 0
    (report,) = json.loads(capsys.readouterr().out)["runs"]
    made = [findings.Finding.from_dict(each) for each in report["findings"]]
    assert [each.to_dict() for each in made] == [each.to_dict() for each in diagnose(Run.open(path))]
    assert (report["path"], report["steps"], report["windows"]) == (str(tmp_path), [0, STEPS - 1], STEPS)


def test_newest_of_several_runs_is_reported_and_the_others_are_named(tmp_path, capsys):
    write(tmp_path / "old", strangled(), 1_600_000_000.0)
    write(tmp_path / "new", healthy(), 1_700_000_000.0)
    main(["report", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(tmp_path / "new")
    assert "clip_too_tight" not in out
    assert str(tmp_path / "old") in out.splitlines()[-1]
    main(["report", "--all", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.index(str(tmp_path / "old")) < out.index("clip_too_tight") < out.index(str(tmp_path / "new"))


def test_run_that_was_killed_is_reported_as_far_as_it_came(tmp_path, capsys):
    path = write(tmp_path, strangled(), end=None)
    path.write_bytes(path.read_bytes()[:-7])
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "killed" in out
    assert "problem" in out
    assert "clip_too_tight" in out


def test_damaged_chunk_is_told_and_survived(tmp_path, capsys):
    path = write(tmp_path, strangled())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "none were recorded" in out
    assert "problem" in out
    assert main(["report", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["problems"]


@pytest.mark.parametrize("what", ["missing", "empty", "file", "unreadable"])
def test_directory_without_a_run_is_refused_in_one_line(tmp_path, capsys, what):
    logdir = tmp_path / "[red]x"
    if what == "empty":
        logdir.mkdir()
    elif what == "file":
        logdir.write_text("not an event file")
    elif what == "unreadable":
        (logdir / f"events.out.tfevents.1.h.1{events.SUFFIX}").mkdir(parents=True)
    assert main(["report", str(logdir)]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trainrt: ")
    assert str(logdir) in captured.err
    assert len(captured.err.splitlines()) == 1


def test_run_of_a_newer_version_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(events, "VERSION", events.VERSION + 1)
    write(tmp_path, strangled())
    monkeypatch.undo()
    assert main(["report", str(tmp_path)]) == BAD_INPUT
    assert "newer" in capsys.readouterr().err


def test_run_without_weights_or_steps_has_a_summary():
    run = Run.synthetic(0, 1)
    assert dict(summary(run))["steps"] == "none were recorded"
    assert dict(summary(Run(run.roster, environment={"optimizer": None, "fit": None})))["ended"]


@pytest.mark.parametrize("arguments", [["report"], ["explain"], ["--version"]])
def test_reading_imports_no_tensorflow(tmp_path, arguments):
    if arguments == ["report"]:
        write(tmp_path, strangled())
        arguments = ["report", str(tmp_path)]
    program = (
        "import sys\n"
        "from trainrt.cli import main\n"
        f"try: status = main({arguments!r})\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'tensorflow', 'keras', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_explain_lists_every_rule_and_prints_each_ones_page(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [rule.__name__ for rule in findings.ALL]
    for rule in findings.ALL:
        assert main(["explain", rule.__name__]) == 0
        assert "Means:" in capsys.readouterr().out
    assert main(["explain", "gremlins"]) == BAD_INPUT
    assert "`trainrt explain` lists the rules" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"trainrt {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["gremlins"], ["report"], ["demo", "--epochs", "0"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert "usage" in capsys.readouterr().err


def test_report_into_a_closed_pipe_ends_quietly(tmp_path):
    write(tmp_path, strangled())
    program = f"{sys.executable} -m trainrt report {tmp_path} | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stderr == ""


def test_demo_tells_the_healthy_run_from_the_stagnating_one(tmp_path, capsys):
    logdir = tmp_path / "a demo"
    command = [sys.executable, "-m", "trainrt", "demo", "--logdir", str(logdir), "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    good, bad = done.stdout.split("== stagnating")
    assert "found nothing wrong" in good
    assert "clip_too_tight" not in good
    assert "ERROR  learning_rate: clip_too_tight" in bad
    assert "45/45" in good
    assert bad.splitlines()[-1].strip() == f"tensorboard --logdir '{logdir}'"
    found = Run.find(logdir)
    assert [path.parent.name for path in found] == ["healthy", "stagnating"]
    assert [[f.causes[0] for f in diagnose(Run.open(path))] for path in found] == [[], ["clip_too_tight"]]


def test_ctrl_c_ends_without_a_traceback(tmp_path, monkeypatch):
    def interrupt(logdir):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "find", interrupt)
    assert main(["report", str(tmp_path)]) == 130


def test_demo_refuses_a_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--logdir", str(tmp_path / "file" / "x")]) == BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err


COMPILER = """#!{python}
import sys
if "--version" in sys.argv:
    print("fake 1.0")
else:
    open(sys.argv[sys.argv.index("-o") + 1], "wb").write(b"a library")
"""


def test_kernels_are_built_shown_and_removed(tmp_path, monkeypatch, capsys):
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"is_cuda_build": True})
    for name in ("CXX", "CUDACXX"):  # what a real one makes is a matter of test_native.py and test_cuda.py
        (tmp_path / name).write_text(COMPILER.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TRAINRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRAINRT_KERNELS", raising=False)
    assert main(["kernels", "clean"]) == 0
    assert main(["kernels", "build", "--gpu"]) == 0
    told = "".join(capsys.readouterr().out.split())
    for kind in ("ops", "gpu"):
        (library,) = (tmp_path / "cache").glob(f"{kind}-*.so")
        assert library.name in told
    assert main(["kernels", "status"]) == 0
    assert library.name in "".join(capsys.readouterr().out.split())
    assert main(["kernels", "clean"]) == 0
    assert not list((tmp_path / "cache").iterdir())


def test_kernels_without_a_compiler_say_what_to_install(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")
    monkeypatch.setenv("TRAINRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["kernels", "build"]) == BAD_INPUT
    assert "Install g++" in " ".join(capsys.readouterr().err.split())
