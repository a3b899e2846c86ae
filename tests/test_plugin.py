"""The routes of the TensorBoard plugin, asked as a browser asks them, and as one who means harm does."""

import argparse
import gzip
import json
import os
import re
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import werkzeug.test
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from trainrt.plugin import answers, device, files, passports, report_html, tables, wire
from trainrt.plugin.app import TrainrtPlugin
from trainrt.plugin.files import digest, static_files
from trainrt.plugin.loader import TrainrtLoader
from trainrt.plugin.sources import Files, Loaded, local
from trainrt.record import events, statistics
from trainrt.record.run import Run
from trainrt.record.vocabulary import VERSION, Document, Epoch

HOSTILE = "<img src=x onerror=alert(1)>/../../'\";</script>"


def write(directory, run, *, findings=(), end=True, cut=None, environment=None, chunk=7):
    """A run as an event file, byte by byte as the sink writes it."""
    directory.mkdir(parents=True)
    record = run._chunks[0] if run._chunks else None
    parts = [events.encode_header(), events.encode_roster(run.roster, environment or run.environment)]
    for start in range(0, len(run), chunk):
        parts.append(events.encode_record(record[start : start + chunk], run.roster))
    parts += [events.encode_epoch(epoch) for epoch in run.epochs]
    if end:
        parts.append(events.encode_findings([dict(f) for f in findings], len(run)))
        parts.append(events.encode_end("finished", step=len(run)))
    data = b"".join(map(events.frame, parts))
    file = directory / events.file_name(1.7e9)
    file.write_bytes(data[: cut if cut is None else int(len(data) * cut)])
    return file


def asked(plugin, route, code=200, **query):
    """The answer of a route: JSON, or an unpacked message."""
    app = plugin.get_plugin_apps()[route if route.startswith("/") else f"/api/{route}"]
    response = werkzeug.test.Client(app, wrappers.Response).get("/", query_string=query)
    assert response.status_code == code, response.get_data(as_text=True)[:500]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    if response.mimetype == "application/json":
        return json.loads(response.get_data(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return unpack(response.get_data()) if response.mimetype == "application/octet-stream" else response


def unpack(data):
    """The twin of wire.js."""
    (length,) = struct.unpack_from("<I", data)
    assert (4 + length) % 8 == 0, "arrays that a browser can view in place"
    header = json.loads(data[4 : 4 + length])
    arrays = {}
    for name, (dtype, shape, at) in header.pop("arrays").items():
        size = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, f"<{dtype}", size, 4 + length + at).reshape(shape)
    return SimpleNamespace(**header, arrays=arrays)


def plugin(logdir, provider=None):
    return TrainrtPlugin(base_plugin.TBContext(logdir=str(logdir), data_provider=provider))


@pytest.fixture
def ratios():
    """[T, P] with a spike, a zero, one that is not measured, and one with NaN."""
    values = 10 ** np.random.default_rng(0).uniform(-5, -1, (40, 4))
    values[11, 0] = 30.0
    values[20, 1] = 0.0
    values[:, 3] = np.nan
    return values


@pytest.fixture
def run(ratios):
    gradient = np.ones((40, 4))
    gradient[:, 3] = np.nan
    broken = np.zeros((40, 4))
    broken[30, 2] = 0.5
    return Run.synthetic(
        40,
        ["a/kernel", "a/bias", "b/kernel", "frozen/kernel"],
        update_ratio=ratios,
        gradient_norm=gradient,
        update_nonfinite_share=broken,
        slots=["momentum"],
        environment={"start": 1.7e9, "optimizer": {"class": "SGD"}, "fit": {"clip": 1.0}},
        epochs=[Epoch(0, 39, {"loss": 1.0, "val_accuracy": float("nan")})],
    )


@pytest.fixture
def logdir(tmp_path, run):
    write(tmp_path / "runs" / "one", run)
    return tmp_path / "runs"


# ------------------------------------------------------------------------------------------------------------ answers


def test_a_picture_of_every_step_tells_what_the_run_tells(logdir, run, ratios):
    told = asked(plugin(logdir), "map", run="one", group="weights", statistic="update_ratio", columns=40)
    values = 10 ** (told.arrays["mean"] / told.factor)
    ordinary = told.arrays["states"] == tables.FINE
    np.testing.assert_allclose(values[ordinary], ratios[ordinary], rtol=2e-3)
    assert ordinary.sum() == 40 * 3 - 2
    assert told.arrays["states"][20, 1] == tables.ZERO
    assert told.arrays["states"][30, 2] == tables.NONFINITE
    assert (told.arrays["states"][:, 3] == tables.MISSING).all()
    np.testing.assert_array_equal(told.arrays["extents"], run.steps)


@pytest.mark.parametrize("columns", [1, 3, 7, 39, 40])
def test_no_peak_is_lost_however_few_the_columns(logdir, ratios, columns):
    told = asked(plugin(logdir), "map", run="one", group="weights", statistic="update_ratio", columns=columns)
    highest = 10 ** (told.arrays["high"][:, 0].max() / told.factor)
    assert highest == pytest.approx(ratios[:, 0].max(), rel=2e-3)
    assert (told.arrays["low"][:, 1] == wire.ZERO).any()
    assert (told.arrays["states"][:, 2] == tables.NONFINITE).any()


@pytest.mark.parametrize("columns", [1, 5, 13])
def test_columns_are_the_smallest_mean_and_largest_of_their_windows(run, columns):
    cut = tables.columns(run.steps, 3, 37, columns)
    [table] = tables.Tables(run).get("weights", ["gradient_ratio"])
    low, mean, high, _ = tables.reduce(table, cut, True)
    with np.errstate(divide="ignore"):
        logs = np.log10(run["gradient_ratio"])
    for c in range(columns):
        inside = (run.steps[:, 1] >= cut.edges[c]) & (run.steps[:, 0] < cut.edges[c + 1])
        # A window that a column only touches belongs to it too.
        part = logs[
            np.flatnonzero(inside)[0] if cut.edges[c] % 1 == 0 else cut.low[c] : np.flatnonzero(inside)[-1] + 1, :3
        ]
        np.testing.assert_allclose(low[c, :3], part.min(0), rtol=1e-5)
        np.testing.assert_allclose(mean[c, :3], part.mean(0), rtol=1e-5)
        np.testing.assert_allclose(high[c, :3], part.max(0), rtol=1e-5)


def test_wide_windows_weigh_as_many_steps_as_they_hold():
    run = Run.synthetic(4, gradient_norm=[1.0, 1.0, 1.0, 100.0])
    record = run._chunks[0]
    record.steps = np.array([[0, 0], [1, 1], [2, 3], [4, 11]])
    cut = tables.columns(record.steps, 0, 11, 1)
    values = np.array([[1.0], [1.0], [1.0], [100.0]], np.float32)
    _, mean, _, _ = tables.reduce(tables.Table(values, np.zeros((4, 1), np.uint8)), cut, True)
    assert mean[0, 0] == pytest.approx(2 * 8 / 12)


def test_every_tenth_step_observed_leaves_no_holes():
    steps = np.repeat(np.arange(0, 100, 10)[:, None], 2, axis=1)
    cut = tables.columns(steps, 0, 90, 91)
    assert cut.inside.all()
    np.testing.assert_array_equal(cut.extents[:, 0], np.arange(91) // 10 * 10)


@pytest.mark.parametrize("group", tables.GROUPS)
def test_every_statistic_of_a_run_has_a_picture(logdir, run, group):
    page = plugin(logdir)
    told = asked(page, "run", run="one")
    assert [one["name"] for one in told["statistics"]] == run.statistics
    for name in run.statistics:
        picture = asked(page, "map", run="one", group=group, statistic=name, columns=9)
        assert picture.arrays["mean"].shape == (9, picture.rows)
        assert picture.kind == tables.kind(name)


def test_lines_and_pictures_tell_the_same(logdir):
    page = plugin(logdir)
    query = {"run": "one", "group": "weights", "columns": 13}
    lines = asked(page, "lines", **query, rows="2,0", statistics="update_ratio,unchanged_share")
    for name in ("update_ratio", "unchanged_share"):
        picture = asked(page, "map", **query, statistic=name)
        for plane, values in zip(("low", "mean", "high"), lines.arrays[name], strict=True):
            codes = picture.arrays[plane][:, [2, 0]]
            usual = np.abs(codes.astype(int)) < 32700
            np.testing.assert_allclose(values[usual], codes[usual] / picture.factor, atol=1 / picture.factor)


@pytest.mark.parametrize(
    "query",
    [{}, {"run": "one", "group": "weights", "statistic": "gradient_norm", "first": 3, "last": 30, "columns": 9},
     {"run": "gone", "group": "nothing", "statistic": "nothing", "first": 900, "last": 2}],
)  # fmt: skip
def test_the_first_answer_is_what_the_single_ones_say(logdir, query):
    page = plugin(logdir)
    told = asked(page, "first", **query)
    assert told.runs == asked(page, "runs")["runs"]
    view = {**told.view, "columns": query.get("columns", 600)}
    assert told.run == asked(page, "run", run=view["run"])
    for route in ("map", "scalars"):
        one, other = unpack(told.arrays[route].tobytes()), asked(page, route, **view)
        assert one.arrays.keys() == other.arrays.keys()
        for name, array in other.arrays.items():
            np.testing.assert_array_equal(one.arrays[name], array)


def test_a_directory_without_a_record_has_a_first_answer(tmp_path):
    told = asked(plugin(tmp_path), "first")
    assert (told.runs, told.run, told.arrays) == ([], None, {})


@pytest.mark.parametrize("group", tables.GROUPS)
def test_tables_of_some_rows_are_rows_of_the_tables(monkeypatch, run, group):
    own = statistics.Statistic("own", "1", ("weight",), lambda weight: weight.sumsq / weight.sumsq.sum(-1)[:, None])
    monkeypatch.setitem(statistics.STATISTICS, "own", own)
    names = run.statistics
    assert "own" in names
    count = len(tables.grouped(run, group).roster.parameters)
    rows = [count - 1, 0]
    whole = tables.Tables(run).get(group, names)
    kept = tables.Tables(run[:13])
    kept.get(group, names, rows)
    kept.run = run  # it grew
    for _ in range(2):  # computed, then cut out of the whole ones
        for one, other in zip(kept.get(group, names, rows), whole, strict=True):
            np.testing.assert_allclose(one.values, other.values[:, rows], rtol=1e-6)
            np.testing.assert_array_equal(one.states, other.states[:, rows])
        kept.get(group, names)


def test_scalars_are_those_of_the_run(logdir, run):
    told = asked(plugin(logdir), "scalars", run="one", columns=40)
    np.testing.assert_allclose(told.arrays["loss"][1], run.scalar("loss"), rtol=1e-6)
    assert set(told.arrays) == {*run.roster.scalars, "clip_share", "extents"}
    run.environment = {"fit": {"clip": None}}
    unclipped = unpack(answers.scalar_lines(tables.Tables(run), tables.columns(run.steps, 0, 39, 40)))
    assert set(unclipped.arrays) == {*run.roster.scalars, "extents"}


@pytest.mark.parametrize("columns", [1, 7, 40, 100])
def test_telemetry_is_that_of_the_steps_since_the_sample_before(columns):
    values = [0.5, 0.25, None, 1.0]
    told = {"samples": {"step": [4, 4, 20, 31], "gpu0/utilisation": values, "cpu_cores": [1.0, 2.0, 3.0, 4.0]}}
    run = Run.synthetic(40, documents=[Document("telemetry", 31, told)])
    cut = tables.columns(run.steps, 0, 39, columns)
    drawn = device.lines(run, cut)
    assert (
        set(drawn)
        == {f"device/{name}" for name in device.samples(run)[1]}
        == {"device/cpu_cores", "device/gpu0/utilisation"}
    )
    at = told["samples"]["step"]
    for name, samples in (("cpu_cores", [1.0, 2.0, 3.0, 4.0]), ("gpu0/utilisation", values)):
        for c in range(len(cut.low)):
            steps = list(range(int(np.ceil(cut.edges[c])), int(np.ceil(cut.edges[c + 1]))))
            covering = next((k for k in range(4) if at[k] >= steps[-1]), None)
            shown = [v for k, v in enumerate(samples) if v is not None and (at[k] in steps or k == covering)]
            low, mean, high = drawn[f"device/{name}"][:, c]
            if shown:
                assert (low, high) == (min(shown), max(shown))
                assert low <= mean <= high
            else:
                assert np.isnan([low, mean, high]).all()


@pytest.mark.parametrize(
    "content", [{}, {"samples": 3}, {"samples": {"step": ["x"]}}, {"samples": {"step": [1], "cpu_cores": [1, 2]}}]
)
def test_nonsense_in_place_of_telemetry_is_no_telemetry(content):
    run = Run.synthetic(9, documents=[Document("telemetry", 8, content)])
    assert device.lines(run, tables.columns(run.steps, 0, 8, 9)) == {}


def test_everything_of_the_machine_that_is_drawn_has_a_title():
    titles = re.search(r"DEVICE = \{(.*?)\n\};", static_files()["numbers.js"].decode(), re.DOTALL)[1]
    assert set(re.findall(r"(\w+): \[", titles)) == {*device.PROCESS, *device.CARD}


def test_a_growing_run_is_answered_as_if_it_were_opened_anew(tmp_path, run):
    file = write(tmp_path / "one", run, end=False)
    whole = file.read_bytes()
    record, roster = run._chunks[0], run.roster
    head = [events.encode_header(), events.encode_roster(roster, run.environment)]
    first = b"".join(map(events.frame, [*head, events.encode_record(record[:7], roster)]))
    file.write_bytes(first)
    page = plugin(tmp_path)
    query = {"run": "one", "group": "weights", "statistic": "update_ratio", "columns": 40}
    assert asked(page, "map", **query).columns == 7
    assert asked(page, "pulse", run="one")["windows"] == 7
    with file.open("ab") as stream:
        stream.write(whole[len(first) :])
    assert asked(page, "pulse", run="one")["windows"] == 40
    grown, fresh = asked(page, "map", **query), asked(plugin(tmp_path), "map", **query)
    for name in fresh.arrays:
        np.testing.assert_array_equal(grown.arrays[name], fresh.arrays[name])


def test_a_run_that_takes_steps_back_is_answered_as_if_it_were_opened_anew(tmp_path, run):
    file = write(tmp_path / "one", run, end=False)
    page = plugin(tmp_path)
    query = {"run": "one", "group": "weights", "statistic": "update_ratio", "columns": 40}
    asked(page, "map", **query)
    again = Run.synthetic(40, run.roster.parameters, update_ratio=1e-2, slots=["momentum"])._chunks[0]
    with file.open("ab") as stream:
        stream.write(events.frame(events.encode_record(again[20:30], run.roster)))
    resumed, fresh = asked(page, "map", **query), asked(plugin(tmp_path), "map", **query)
    assert resumed.columns == 30
    np.testing.assert_array_equal(resumed.arrays["mean"], fresh.arrays["mean"])


def test_a_comparison_is_on_the_steps_that_were_asked_for(tmp_path, run):
    write(tmp_path / "long", run)
    write(
        tmp_path / "short",
        Run.synthetic(10, run.roster.parameters, slots=["momentum"], environment={"fit": {"clip": 2.0}}),
    )
    page = plugin(tmp_path)
    told = asked(page, "map", run="short", statistic="update_ratio", first=0, last=39, columns=40, exact=1)
    assert told.edges == [0, 40]
    assert (told.arrays["states"][10:] == tables.MISSING).all()
    both = asked(page, "compare", run="long", versus="short")
    assert ["fit.clip", "1.0", "2.0"] in both["passport"]
    assert both["common"] == 10


def test_divergence_is_the_first_step_that_differs():
    loss = np.linspace(2, 1, 30)
    other = loss.copy()
    other[12] *= 1 + 1e-9
    other[20:] *= 2
    told = answers.divergence(Run.synthetic(30, loss=loss), Run.synthetic(30, loss=other))
    assert (told["differs"], told["diverges"]) == (12, 20)
    assert answers.divergence(Run.synthetic(30, loss=loss), Run.synthetic(25, loss=loss[:25]))["differs"] is None


def test_a_finding_reaches_the_page_in_full(tmp_path, run):
    finding = {
        "rule": "learning_rate", "severity": "error", "confidence": 0.9, "causes": ["lr_too_high"],
        "where": ["a/kernel"], "steps": [3, 9], "message": "too high", "advice": ["lower it"],
        "evidence": {"consequences": [{"rule": "nonfinite", "message": "then NaN"}]},
    }  # fmt: skip
    write(tmp_path / "one", run, findings=[finding])
    told = asked(plugin(tmp_path), "run", run="one")
    assert told["verdict"] == {"level": "error", "title": "Likely cause: learning rate too high"}
    [shown] = told["findings"]
    assert {k: shown[k] for k in ("rule", "where", "steps", "message", "advice")} == {
        k: finding[k] for k in ("rule", "where", "steps", "message", "advice")
    }
    assert shown["consequences"] == finding["evidence"]["consequences"]


def test_a_run_without_an_end_is_judged_here(tmp_path):
    from trainrt.findings import diagnose

    kernel = Run.synthetic(1, 1).roster.parameters
    run = Run.synthetic(64, kernel, loss=np.where(np.arange(64) < 32, 1.0, np.nan), update_nonfinite_share=0.5)
    write(tmp_path / "one", run, end=False)
    told = asked(plugin(tmp_path), "run", run="one")
    assert [f["rule"] for f in told["findings"]] == [f.rule for f in diagnose(Run.open(tmp_path / "one"))]
    assert told["findings"]


# ------------------------------------------------------------------------------------------------------------ sources


def test_only_the_runs_that_are_looked_at_are_opened(tmp_path, run, monkeypatch):
    for i in range(50):
        write(tmp_path / f"run{i}", Run.synthetic(3))
    opened = []
    monkeypatch.setattr(Run, "open", classmethod(lambda cls, path, was=Run.open: (opened.append(path), was(path))[1]))
    page = plugin(tmp_path)
    names = asked(page, "runs")["runs"]
    assert len(names) == 50
    asked(page, "run", run="run7")
    assert [path.name for path in opened] == ["run7"]
    for _ in range(3):  # a browser begins to load TensorBoard: the newest run is read before it asks
        assert page.is_active()
    asked(page, "first")
    assert [path.name for path in opened] == ["run7", names[0]]


def test_a_run_is_read_ahead_but_not_judged_before_anybody_looks(tmp_path, run):
    write(tmp_path / "one", run, end=False)
    page = plugin(tmp_path)
    page.warm()
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread() and "_warm" in thread.name:
            thread.join()
    opened = page.opened("", "one")
    assert opened.judge.rounds == 0
    assert not opened.judge.busy
    assert any(key[-1] == "update_ratio" for key in opened.tables._kept)


def test_a_run_trained_into_the_same_place_is_opened_anew(tmp_path, run):
    file = write(tmp_path / "one", run)
    page = plugin(tmp_path)
    assert asked(page, "pulse", run="one")["windows"] == 40
    file.unlink()
    file.parent.rmdir()
    write(tmp_path / "one", Run.synthetic(5))
    assert asked(page, "pulse", run="one")["windows"] == 5


@pytest.mark.parametrize("samples", [0, 1000])
def test_tensorboards_own_copy_of_a_record_is_the_record(logdir, run, samples):
    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"trainrt": samples})
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    source = Loaded(data_provider.MultiplexerDataProvider(multiplexer, str(logdir)))
    assert source.names() == Files(logdir).names() == ["one"]
    mine, disk = source.open("one"), Run.open(logdir / "one")
    assert not mine.problems
    assert (mine.end["how"], mine.environment, mine.epochs[0].step) == (disk.end["how"], disk.environment, 39)
    assert not source.stale("one", mine)
    np.testing.assert_array_equal(mine.steps, disk.steps)
    for name in run.statistics:
        np.testing.assert_array_equal(mine[name], disk[name])


def test_a_directory_elsewhere_is_not_local():
    assert all(map(local, ("/logs", "logs")))
    assert not any((local("gs://bucket/logs"), local("", "a:/logs"), local(None)))


# ------------------------------------------------------------------------------------------------- those who mean harm


@pytest.mark.parametrize(
    "name", ["../secret", "..", "/etc", "one/../../secret", "one/", "%2e%2e", "", "one\0", "\\..\\secret", "a" * 5000]
)
@pytest.mark.parametrize("route", ["run", "map", "lines", "scalars"])
def test_no_name_leads_out_of_the_log_directory(tmp_path, logdir, route, name):
    write(tmp_path / "secret", Run.synthetic(3))
    told = asked(plugin(logdir), route, code=404 if name else 400, run=name, statistic="update_ratio")
    assert "error" in told


@pytest.mark.parametrize("kind", ["file", "directory", "continuation", "pipe"])
def test_no_link_leads_out_of_the_log_directory(tmp_path, logdir, run, kind):
    secret = write(tmp_path / "secret", Run.synthetic(3, ["secret/kernel"]))
    within = write(logdir / "two", run)
    if kind == "directory":
        (logdir / "linked").symlink_to(secret.parent)
    elif kind == "pipe":
        within.unlink()
        os.mkfifo(within)
    else:
        place = within if kind == "file" else within.with_name(events.file_name(1.8e9))
        place.unlink(missing_ok=True)
        place.symlink_to(secret)
    app = plugin(logdir)
    for name in ("two", "linked"):
        client = werkzeug.test.Client(app.get_plugin_apps()["/api/run"], wrappers.Response)
        assert "secret/kernel" not in client.get("/", query_string={"run": name}).get_data(as_text=True)
    assert asked(app, "run", run="one")


@pytest.mark.parametrize("name", ["a b?c=d&e#f", "%2e%2e", "new\nline", "\u202egnp.exe", HOSTILE.replace("/", "|")])
def test_a_directory_of_any_name_is_a_run_like_others(logdir, run, name):
    write(logdir / name, run)
    write(logdir / "\udce9", run)  # bytes that are no text: no browser can ask for it, and it hides no other
    told, one = (asked(plugin(logdir), "run", run=each) for each in (name, "one"))
    assert told.pop("name") == name
    assert {k: v for k, v in told.items() if k != "end"} == {k: v for k, v in one.items() if k not in ("name", "end")}


@pytest.mark.parametrize(
    ("route", "query"),
    [
        ("map", {"statistic": "__class__"}),
        ("map", {"statistic": HOSTILE}),
        ("map", {}),
        ("map", {"statistic": "update_ratio", "group": "../layers"}),
        ("map", {"statistic": "update_ratio", "columns": "-1"}),
        ("map", {"statistic": "update_ratio", "first": "1e99"}),
        ("map", {"statistic": "update_ratio", "first": "9" * 40}),
        ("map", {"statistic": "update_ratio", "last": "٣"}),
        ("lines", {"statistics": "update_ratio", "rows": "0,99"}),
        ("lines", {"statistics": "update_ratio", "rows": "-1"}),
        ("lines", {"statistics": "update_ratio", "rows": ",".join("0" * 1000)}),
        ("lines", {"statistics": ",".join(["update_ratio"] * 1000), "rows": "0"}),
        ("lines", {"statistics": "nothing", "rows": "0"}),
        ("compare", {}),
    ],
)
def test_a_senseless_request_is_refused_in_words(logdir, route, query):
    assert asked(plugin(logdir), route, code=400, run="one", **query)["error"]


def test_a_huge_request_costs_no_more_than_a_picture(logdir):
    told = asked(
        plugin(logdir), "map", run="one", statistic="update_ratio", first=0, last=10**14, exact=1, columns=10**14
    )
    assert told.columns == answers.MOST_COLUMNS


def test_the_page_only_reads(logdir):
    for app in plugin(logdir).get_plugin_apps().values():
        client = werkzeug.test.Client(app, wrappers.Response)
        before = sorted(logdir.rglob("*"))
        for method in ("post", "put", "delete"):
            assert getattr(client, method)("/", query_string={"run": "one"}).status_code in (200, 405)
        assert sorted(logdir.rglob("*")) == before


def test_markup_in_names_stays_text(tmp_path):
    run = Run.synthetic(5, [f"{HOSTILE}/kernel"], environment={HOSTILE: HOSTILE})
    write(
        tmp_path / "one", run, findings=[{"rule": HOSTILE, "message": HOSTILE, "where": [HOSTILE], "severity": HOSTILE}]
    )
    response = werkzeug.test.Client(plugin(tmp_path).get_plugin_apps()["/api/run"], wrappers.Response).get("/?run=one")
    assert response.mimetype == "application/json"
    assert json.loads(response.get_data())["findings"][0]["severity"] == "info"
    page = report_html.build([("one", Run.open(tmp_path / "one"))], title=HOSTILE)
    assert "<img src=x" not in page
    assert page.count("</script>") == page.count("<script")


@pytest.mark.parametrize(
    "finding", [{}, {"steps": "x"}, {"steps": [1]}, {"where": 5, "advice": {"a": 1}}, {"evidence": [1]},
                {"causes": None}, {"evidence": {"consequences": [1, {"rule": None}]}},
                {"confidence": "high", "severity": 3}]
)  # fmt: skip
def test_a_finding_of_any_form_is_shown(tmp_path, finding):
    write(tmp_path / "one", Run.synthetic(5), findings=[finding])
    [shown] = asked(plugin(tmp_path), "run", run="one")["findings"]
    assert shown["severity"] == "info"
    assert all(isinstance(shown[name], list) for name in ("where", "advice", "causes", "consequences"))


@pytest.mark.parametrize("cut", [0.0, 0.002, 0.1, 0.5, 0.9, 0.999])
def test_a_half_written_run_is_shown_as_far_as_it_goes(tmp_path, run, cut):
    write(tmp_path / "one", run, cut=cut)
    page = plugin(tmp_path)
    told = asked(page, "run", run="one")
    assert told["verdict"]["title"]
    if told["windows"]:
        assert asked(page, "map", run="one", statistic="update_ratio").rows == len(told["rows"]["layers"])
    else:
        assert "No steps" in asked(page, "map", code=409, run="one", statistic="update_ratio")["error"]


def test_another_versions_record_is_named_as_such(tmp_path, run):
    directory = tmp_path / "newer"
    directory.mkdir()
    content = {"version": VERSION + 1, "roster": {}, "environment": {}}
    event = events._encode_json("roster", content, 0, None)
    (directory / events.file_name()).write_bytes(events.frame(events.encode_header()) + events.frame(event))
    page = plugin(tmp_path)
    assert f"version {VERSION + 1}" in asked(page, "run", run="newer")["unreadable"]
    assert "version" in asked(page, "map", code=409, run="newer", statistic="update_ratio")["error"]


def test_an_empty_log_directory_is_quiet(tmp_path):
    page = plugin(tmp_path / "nothing")
    assert asked(page, "runs") == {"runs": []}
    assert not page.is_active()


def test_no_event_file_makes_a_server_error(tmp_path, run):
    file = write(tmp_path / "one", run)
    data, random = file.read_bytes(), np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 5):
            damaged[at] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        page = plugin(tmp_path)
        told = asked(page, "run", run="one")
        if told.get("windows"):
            asked(page, "map", run="one", statistic="update_ratio", columns=5)
            asked(page, "scalars", run="one", columns=5)


# -------------------------------------------------------------------------------------------- TensorBoard and its rules


def test_tensorboard_finds_the_plugin_and_keeps_one_sample_of_a_local_record():
    from importlib.metadata import entry_points

    [entry] = entry_points(group="tensorboard_plugins", name="trainrt")
    assert entry.load() is TrainrtLoader
    flags = argparse.Namespace(logdir="/logs", logdir_spec="", samples_per_plugin={"scalars": 5})
    TrainrtLoader().fix_flags(flags)
    assert flags.samples_per_plugin == {"scalars": 5, "trainrt": 1}
    flags = argparse.Namespace(logdir="gs://logs", logdir_spec="", samples_per_plugin={})
    TrainrtLoader().fix_flags(flags)
    assert flags.samples_per_plugin == {"trainrt": 0}
    flags = argparse.Namespace(logdir="/logs", logdir_spec="", samples_per_plugin={"trainrt": 3})
    TrainrtLoader().fix_flags(flags)
    assert flags.samples_per_plugin == {"trainrt": 3}


@pytest.mark.parametrize("broken", ["trainrt.plugin.app", "trainrt.plugin.sources", "numpy"])
def test_the_loader_never_raises(broken):
    code = f"""
import sys
sys.modules[{broken!r}] = None
from trainrt.plugin.loader import TrainrtLoader
TrainrtLoader().fix_flags(None)
assert TrainrtLoader().load(None) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_loader_imports_nothing_of_weight():
    code = "import sys, tensorboard.plugins.base_plugin; before = set(sys.modules); import trainrt.plugin.loader; " \
           "print(*{name.split('.')[0] for name in set(sys.modules) - before})"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"tensorflow", "keras", "numpy", "google_crc32c"} & set(found)


def test_the_plugin_loads_without_tensorflow(logdir):
    code = f"""
import sys
import threading
from types import SimpleNamespace
from trainrt.plugin.loader import TrainrtLoader
plugin = TrainrtLoader().load(SimpleNamespace(logdir={str(logdir)!r}, data_provider=None, flags=None))
assert plugin.is_active() and plugin.get_plugin_apps()
assert not {{"tensorflow", "keras"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_tensorboard_serves_the_page_under_its_own_rules(logdir, encoding):
    from tensorboard.backend import application

    context = base_plugin.TBContext(logdir=str(logdir), data_provider=None)
    app = application.TensorBoardWSGI([TrainrtPlugin(context)], "/tb")
    client = werkzeug.test.Client(app, wrappers.Response)
    assert client.get("/tb/data/plugin/trainrt/api/runs").get_json() == {"runs": ["one"]}
    for name in static_files():
        response = client.get(f"/tb/data/plugin/trainrt/{digest()}/{name}", headers={"Accept-Encoding": encoding})
        assert response.status_code == 200
        assert response.headers.get("Content-Encoding", "") == encoding
        assert (gzip.decompress(response.data) if encoding else response.data) == static_files()[name]
        assert int(re.search(r"max-age=(\d+)", response.headers["Cache-Control"])[1]) > 86400
        assert response.mimetype == ("text/css" if name.endswith(".css") else "text/javascript")
    assert client.get("/tb/data/plugin/trainrt/../../../loader.py").status_code == 404


def test_a_browser_may_keep_files_because_changed_ones_are_elsewhere(monkeypatch):
    before, own = digest(), static_files()
    assert digest() == before
    monkeypatch.setattr(files, "static_files", lambda: {**own, "page.js": own["page.js"] + b" "})
    assert digest() != before


def test_the_frame_asks_for_every_module_at_once():
    named = re.search(r"MODULES = \[(.*?)\]", static_files()["index.js"].decode(), re.DOTALL)[1]
    asked_for = {f"{name}.js" for name in re.findall(r"'(\w+)'", named)}
    assert asked_for == {name for name in static_files() if name.endswith(".js")} - {"index.js", "embedded.js"}


def test_the_pages_fetch_nothing_from_elsewhere():
    for name, data in static_files().items():
        text = data.decode()
        for mark in ("https:", "@import", "eval(", "innerHTML", "insertAdjacentHTML", "document.write"):
            assert mark not in text, f"{name}: {mark}"
        assert text.replace("'http://www.w3.org/2000/svg'", "").count("http:") == 0, name
        for line in text.splitlines():
            if line.startswith("import"):
                assert line.split("'")[1].removeprefix("./") in static_files(), line


# ----------------------------------------------------------------------------------------------------- the parts alone


def test_a_message_comes_back_as_it_was_sent():
    arrays = {"a": np.arange(7, dtype="<f4"), "b": np.zeros((2, 0)), "c": np.arange(3, dtype=np.uint8)[:, None]}
    told = unpack(wire.pack({"x": [1, float("nan"), HOSTILE]}, arrays))
    assert told.x == [1, None, HOSTILE]
    for name, array in arrays.items():
        np.testing.assert_array_equal(told.arrays[name], array)


def test_codes_keep_what_is_no_number():
    values = np.array([np.nan, -np.inf, np.inf, 0.0, 1e300, -1e300, 5e-324])
    codes, factor = wire.quantise(values)
    assert codes[:3].tolist() == [wire.MISSING, wire.ZERO, wire.OVER]
    assert codes[3:].tolist() == [0, wire.MOST, -wire.MOST, 0]
    assert np.isfinite(factor)
    assert wire.quantise(np.array([np.nan]))[1] == wire.quantise(np.zeros(3))[1] == 1.0


def test_tables_are_forgotten_before_they_fill_the_memory(monkeypatch, run):
    monkeypatch.setattr(tables, "KEPT_BYTES", 2000)
    kept = tables.Tables(run)
    for name in run.statistics:
        kept.get("weights", [name])
    assert len(kept._kept) <= 3
    with pytest.raises(KeyError, match="nothing"):
        kept.get("weights", ["nothing"])


def test_the_passports_own_names_and_times_are_no_difference():
    left = {"start": 1.0, "fit": {"logdir": "a", "epochs": 3}, "optimizer": {"name": "sgd", "class": "SGD"}}
    right = {"start": 2.0, "fit": {"logdir": "b", "epochs": 3}, "optimizer": {"name": "sgd_1", "class": "SGD"}, "x": 1}
    assert passports.differences(left, right) == [("x", "-", "1")]
