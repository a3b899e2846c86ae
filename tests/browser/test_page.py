"""The page as a user meets it: in TensorBoard, in a real browser."""

import re
import shutil
import time

import numpy as np
import pytest

from trainrt.plugin import report_html
from trainrt.record import events
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document

from .conftest import Writer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

MAP = 'canvas[aria-label="Map of layers and steps"]'
LEFT, RIGHT, TOP = 190, 14, 14
HOSTILE = "<img src=x onerror=\"document.body.dataset.owned='1'\">"


def pixel(tab, x, y, selector=MAP):
    """[r, g, b] of a point of a canvas, in CSS pixels."""
    return tab.frame.locator(selector).evaluate(
        "(c, [x, y]) => { const r = c.width / c.clientWidth;"
        "return [...c.getContext('2d').getImageData(x * r, y * r, 1, 1).data].slice(0, 3); }",
        [x, y],
    )


def width_of(tab):
    return tab.frame.locator(MAP).evaluate("c => c.clientWidth")


def at_step(tab, step, steps):
    """The x of a step in a map of all `steps`."""
    return LEFT + (width_of(tab) - LEFT - RIGHT) * (step + 0.5) / steps


def audit(tab):
    """Violations that axe finds in the page's own frame."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe is missing: pip install trainrt[browser]")
    tab.inner.evaluate(axe.AXE_SCRIPT)
    found = tab.inner.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found["violations"]]


def test_a_plain_tensorboard_shows_the_verdict(tab, server):
    page = tab().go(server)
    assert page.page.get_by_role("tab", name="Training").count()
    assert page.text("h1") == "Likely cause: clip too tight"
    assert "clip=" in page.text(".try")
    assert page.frame.get_by_role("img", name="Error").count()
    order = page.frame.locator("h1, h2").all_inner_texts()
    assert [*order[:3], order[-1]] == ["Likely cause: clip too tight", "Map", "Curves", "Passport"]
    page.keep("verdict")


def test_too_low_and_fine_read_at_once(tab, server, logdir):
    page = tab().go(server)
    red, _, blue = pixel(page, LEFT + 300, TOP + 15)
    assert blue > red + 50, "a strangled layer is blue"
    name = next(p for p in logdir.glob("healthy/*")).relative_to(logdir).as_posix()
    page.after(lambda: page.frame.get_by_label("Run", exact=True).select_option(name))
    assert page.text("h1") == "No rule found a fault"
    rgb = pixel(page, LEFT + 300, TOP + 15)
    assert min(rgb) > 190, "a learning layer is pale"


def test_the_data_passport_sets_training_beside_validation(tab, server):
    page = tab().go(server)
    told = page.frame.get_by_role("region", name="What the data looked like")
    assert told.locator("thead").inner_text().split() == ["Training", "Validation"]
    rows = dict(row.split("\t")[:2] for row in told.locator("tbody").inner_text().splitlines())
    assert rows["rows"] == "1,437"
    assert rows["described from"] == "all rows, 45 batches"
    assert rows["input: range"] == "0 to 1"
    assert rows["target: classes"].startswith("10 (")
    assert "None of the 360 validation rows" in page.text("#passport-title >> xpath=../..")
    told.scroll_into_view_if_needed()
    page.keep("data")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "Determinism was not asked for"),
        ({"determinism": {"enforced": True}}, "Deterministic mode was on; not proven"),
        ({"certificate": {"identical": True, "result": "bit-identical"}}, "Determinism: bit-identical"),
        ({"certificate": {"identical": False, "result": "differs"}}, "Determinism: differs"),
    ],
)
def test_the_badge_says_how_far_the_bits_can_be_trusted(tab, serve, tmp_path, environment, says):
    Writer(tmp_path / "a", Run.synthetic(4, environment=environment)).windows(0, 4).close()
    page = tab().go(serve(tmp_path))
    assert page.text(".badge") == says
    assert ("good" in page.frame.locator(".badge").get_attribute("class")) == (
        says.split()[-1] in ("bit-identical", "proven")
    )


def test_a_description_of_a_part_of_the_data_says_of_how_much(tab, serve, tmp_path):
    writer = Writer(tmp_path / "a", Run.synthetic(steps=8))
    seen = {"batches": 64, "rows": 2048, "share": 2048 / 60000}
    train = {"source": "arrays", "rows": 60000, "batches": 1875, "seen": seen, "passes": [0, 1, 3], "inputs": []}
    writer.put(events.encode_document(Document("data", 0, {"train": train})))
    writer.windows(0, 8).close()
    page = tab().go(serve(tmp_path))
    rows = dict(row.split("\t") for row in page.text(".passport tbody").splitlines())
    assert rows["described from"] == "2,048 rows (3.41 %), 64 batches"
    assert rows["passes looked at"] == "3"


def test_nonsense_in_place_of_a_data_passport_leaves_the_page_whole(tab, serve, tmp_path):
    writer = Writer(tmp_path / "a", Run.synthetic(steps=8))
    writer.put(
        events.encode_document(
            Document("data", 0, {"train": {"rows": {}, "inputs": 7, "pipeline": {"stages": [HOSTILE]}}})
        )
    )
    writer.windows(0, 8).close()
    page = tab().go(serve(tmp_path))
    assert page.text("h1") == "No rule found a fault"
    assert "makes no sense" in page.text(".passport .problem")


def test_a_finding_leads_to_its_steps_and_layers(tab, server):
    page = tab().go(server)
    page.after(lambda: page.frame.locator(".findings button").first.click())
    assert page.frame.locator(".chip").count() == 3
    assert page.frame.locator(".findings button").first.get_attribute("aria-expanded") == "true"
    assert "finding=0" in page.page.url
    page.keep("finding")
    again = tab().go(server, page.page.url.replace(server.url, ""))
    assert again.frame.locator(".chip").count() == 3
    assert again.frame.locator(".findings .body").first.is_visible()


def test_the_pointer_tells_numbers(tab, server, logdir):
    page = tab().go(server)
    run = Run.open(next(logdir.glob("stagnating/*"))).by_layer()
    page.frame.locator(MAP).hover(position={"x": at_step(page, 60, 135), "y": TOP + 34 + 10})
    tip = page.frame.locator(".tip").first.inner_text()
    assert all(words in tip for words in ("digits/hidden", "step 60", "too low"))
    told, power = re.search(r"([\d.]+)·10⁻(.)", tip).groups()
    assert float(told) * 10 ** -"⁰¹²³⁴⁵⁶⁷⁸⁹".index(power) == pytest.approx(run["update_ratio"][60, 1], rel=0.06)


def test_dragging_zooms_and_a_double_click_shows_everything(tab, server):
    page = tab().go(server)
    box = page.frame.locator(MAP).bounding_box()
    a, b = box["x"] + at_step(page, 30, 135), box["x"] + at_step(page, 60, 135)

    def drag():
        page.page.mouse.move(a, box["y"] + 40)
        page.page.mouse.down()
        page.page.mouse.move((a + b) / 2, box["y"] + 44, steps=4)
        page.page.mouse.move(b, box["y"] + 44, steps=4)
        page.page.mouse.up()

    page.after(drag)
    assert page.text(".range").startswith("steps 30 to 60")
    page.after(lambda: page.frame.locator(MAP).dblclick(position={"x": 600, "y": 40}))
    assert page.text(".range").startswith("steps 0 to 134")


def test_the_map_is_used_by_keyboard(tab, server):
    page = tab().go(server)
    chart = page.frame.locator(MAP)
    chart.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        chart.press(key)
    said = page.frame.locator(".heatmap .unseen").first
    assert said.inner_text().startswith("digits/hidden, step 2")
    page.after(lambda: chart.press("Enter"))
    assert "digits/hidden" in page.text(".chip")
    page.after(lambda: chart.press("+"))
    assert not page.text(".range").startswith("steps 0 to 134")
    page.after(lambda: chart.press("Escape"))
    assert page.text(".range").startswith("steps 0 to 134")


def test_a_layer_is_found_by_name_and_rows_are_grouped(tab, server):
    page = tab().go(server)
    page.after(lambda: page.frame.get_by_label("Find a layer").fill("digits/logits"))
    assert page.frame.locator(".chip").count() == 2
    page.after(lambda: page.frame.get_by_label("Rows").select_option("weights"))
    page.after(lambda: page.frame.get_by_label("Statistic").select_option("unchanged_share"))
    page.after(lambda: page.frame.get_by_label("Order").select_option("value"))
    assert all(part in page.page.url for part in ("group=weights", "statistic=unchanged_share", "order=value"))


def test_two_runs_are_compared_on_the_same_steps(tab, server, logdir):
    page = tab().go(server)
    name = next(p for p in logdir.glob("healthy/*")).relative_to(logdir).as_posix()
    page.after(lambda: page.frame.get_by_label("Compare with").select_option(label=name))
    assert "The losses first differ at step" in page.text(".reasons")
    assert "clip" in page.text("ol[aria-label='Explanations, likeliest first'] li >> nth=0")
    assert f"differs from {name} (GOOD)" in page.text(".reasons summary")
    assert page.text(".passports tbody").split("\t") == ["fit.clip", "0.0001", "1.0"], "only the clip differs"
    assert page.frame.locator("section:has(#compare-title) .heatmap canvas").count() == 3
    losses = page.frame.locator("canvas[aria-label^='Loss of each run']").get_attribute("aria-label")
    assert name in losses
    assert "stagnating/" in losses
    page.keep("comparison")


def four_runs(logdir):
    """`same` as `base`; `later`, whose loss has other bits from step 20 and is far off from 30, with a larger update;
    `other` of a model made later in the process, with another optimizer and a tenth of the update."""
    names, loss = ["dense/kernel", "dense_1/kernel"], np.linspace(2, 1, 60)
    left = loss.copy()
    left[20:] *= 1 + 1e-9
    left[30:] *= 1.5
    ratio = np.full((60, 2), 1e-3)
    grown = ratio.copy()
    grown[30:, 1] = 1e-2
    sgd = {"fit": {"clip": 1.0}, "optimizer": {"class": "SGD", "config": {"learning_rate": 0.1}}}
    adam = {"fit": {"clip": 1.0}, "optimizer": {"class": "Adam", "config": {"learning_rate": 0.1, "beta_1": 0.9}}}
    runs = {
        "base": Run.synthetic(60, names, loss=loss, update_ratio=ratio, environment=sgd, slots=["momentum"]),
        "same": Run.synthetic(60, names, loss=loss, update_ratio=ratio, environment=sgd),
        "later": Run.synthetic(60, names, loss=left, update_ratio=grown, environment={**sgd, "fit": {"clip": 2.0}}),
        "other": Run.synthetic(
            40, ["dense_2/kernel", "dense_3/kernel"], loss=loss[:40] * 2, update_ratio=ratio[:40] / 10, environment=adam
        ),
    }
    for name, run in runs.items():
        Writer(logdir / name, run).windows(0, len(run)).close()


def test_any_runs_are_compared_side_by_side_with_one_of_them(tab, serve, tmp_path):
    four_runs(tmp_path)
    server = serve(tmp_path)
    page = tab().go(server, "#trainrt&run=base")
    add = page.frame.get_by_label("Compare with")
    for name in ("later", "other"):
        add.focus()
        page.after(lambda name=name: add.select_option(label=name))
        assert add.evaluate("select => select === document.activeElement"), "the keyboard stays where it was"
    page.after(lambda: add.select_option(label="same"))
    assert page.page.url.endswith("&versus=later&versus=other&versus=same&rows=dense")

    # In few words: since when, and why.
    board = [row.split("\t") for row in page.text(".board tbody").splitlines()]
    assert [row[0].split()[0] for row in board] == ["base", "later", "other", "same"]
    assert [row[3:5] for row in board] == [["", ""], ["step 20", "step 30"], ["step 0", "step 0"], ["never", "never"]]
    assert board[1][5].startswith("clip 1 → 2")
    assert board[2][5].startswith("optimizer SGD")
    assert page.frame.locator(".reasons details").count() == 3

    # Side by side, on one scale, the first differences marked.
    def colour(name, step, row, kind="Map of "):
        selector = f"canvas[aria-label='{kind}{name}']"
        canvas = page.frame.locator(selector)
        left = LEFT if kind else 0
        x = left + (canvas.evaluate("c => c.clientWidth") - left - RIGHT) * (step + 0.5) / 60
        return pixel(page, x, row if row < TOP else TOP + 34 * (row - TOP) + 20, selector)

    top, second = TOP, TOP + 1
    assert colour("base", 50, second) == colour("same", 50, second) == colour("later", 10, second)
    red, _, blue = colour("later", 50, second)
    assert (red, blue) != tuple(colour("base", 50, second)[::2])
    apart = {name: f"{name} against base" for name in ("later", "other", "same")}
    grey = colour(apart["same"], 50, top, "")
    assert max(grey) - min(grey) < 8, "the same is grey"
    assert colour(apart["later"], 10, second, "") == grey
    red, _, blue = colour(apart["later"], 50, second, "")
    assert red > blue + 60, "ten times as large is orange"
    red, _, blue = colour(apart["other"], 20, top, "")
    assert blue > red + 60, "a tenth is blue, though Keras named the layers otherwise"
    yellow, red, none = (colour("later", step, 5) for step in (20, 30, 40))
    assert yellow != red != none != yellow

    # What differs in the passports, a column a run.
    head = page.frame.locator(".passports thead th").all_inner_texts()
    assert [name.strip() for name in head] == ["Entry", "base", "later", "other", "same"]
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in page.text(".passports tbody").splitlines()}
    assert rows["fit.clip"] == ["1.0", "2.0", "1.0", "1.0"]
    assert rows["optimizer.class"] == ["SGD", "SGD", "Adam", "SGD"]
    assert "optimizer.config.learning_rate" not in rows
    assert page.frame.locator(".passports td b", has_text="Adam").count() == 1

    # Another baseline turns the differences round, and can be linked to.
    choice = page.frame.get_by_label("Baseline")
    choice.focus()
    page.after(lambda: choice.select_option("later"))
    assert choice.evaluate("select => select === document.activeElement")
    red, _, blue = colour("base against later", 50, second, "")
    assert blue > red + 60
    assert "clip 2 → 1 " in page.text(".board tbody"), "from the baseline's to its own, whichever is the good one"
    page.keep("comparison-of-four")
    again = tab().go(server, page.page.url.replace(server.url, ""))
    assert again.text(".board tbody").split()[0] == "later"
    again.after(lambda: again.frame.get_by_role("button", name="Leave out other").click())
    assert again.frame.locator(".board tbody tr").count() == 3

    # A statistic that one run alone has.
    page.after(lambda: page.frame.get_by_label("Statistic").select_option("momentum_norm"))
    assert "other did not record this statistic" in page.text(".pairs")
    assert page.frame.locator("canvas[aria-label='Map of base']").is_visible()


def test_a_run_that_grows_is_compared_to_its_end(tab, serve, tmp_path):
    loss = np.linspace(2, 1, 90)
    other = np.where(np.arange(90) < 60, loss, 2 * loss)
    Writer(tmp_path / "done", Run.synthetic(90, ["a/kernel"], loss=loss)).windows(0, 90).close()
    writer = Writer(tmp_path / "live", Run.synthetic(90, ["a/kernel"], loss=other)).windows(0, 30)
    page = tab().go(serve(tmp_path), "#trainrt&run=live&versus=done")
    since = "document.querySelectorAll('.board tbody td.number')[5].innerText"
    assert page.inner.evaluate(since) == "never"
    page.after(lambda: writer.windows(30, 50))
    page.after(lambda: writer.windows(50, 90))
    page.after(writer.close)
    page.inner.wait_for_function(f"{since} === 'step 60'", timeout=20_000)


def test_runs_that_hold_nothing_to_compare_are_said_beside_the_others(tab, serve, tmp_path):
    four_runs(tmp_path)
    Writer(tmp_path / "empty", Run.synthetic(3))
    newer = Writer(tmp_path / "newer", Run.synthetic(3))
    newer.file.write_bytes(b"")
    newer.put(events.encode_header())
    newer.put(events._encode_json("roster", {"version": 999, "roster": {}, "environment": {}}, 0, None))
    page = tab().go(
        serve(tmp_path), "#trainrt&run=base&versus=later&versus=empty&versus=newer&versus=gone&baseline=gone"
    )
    told = page.frame.locator("section:has(#compare-title) .problem").inner_text()
    assert "empty has no recorded steps" in told
    assert "version 999" in told
    assert [row.split()[0] for row in page.text(".board tbody").splitlines()] == ["base", "later"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_comparison_of_four_passes_the_audit(tab, serve, tmp_path, width, dark):
    four_runs(tmp_path)
    page = tab(width=width, dark=dark).go(serve(tmp_path), "#trainrt&run=base&versus=later&versus=other&versus=same")
    for summary in page.frame.locator(".reasons summary").all():
        summary.click()
    assert page.inner.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keep(f"comparison-{'dark' if dark else 'light'}-{width}")
    assert audit(page) == []
    page.frame.get_by_role("button", name="See the comparison").press("Enter")
    assert page.inner.evaluate("document.activeElement.id") == "compare-title"
    assert page.inner.evaluate("document.querySelector('#compare-title').getBoundingClientRect().top < innerHeight")


def test_a_running_job_grows_and_keeps_the_chosen_place(tab, serve, tmp_path):
    run = Run.synthetic(90, ["a/kernel", "b/kernel"], update_ratio=1e-3)
    writer = Writer(tmp_path / "live", run).windows(0, 30)
    page = tab().go(serve(tmp_path), "#trainrt&first=5&last=14&rows=b")
    assert page.text(".range").startswith("steps 5 to 14")
    begun = time.monotonic()
    page.after(lambda: writer.windows(30, 60))
    assert time.monotonic() - begun < 5
    assert "60" in page.text(".facts")
    assert page.text(".range").startswith("steps 5 to 14")
    assert "b" in page.text(".chip")
    page.after(lambda: page.frame.get_by_role("button", name="Show all").click())
    page.after(lambda: writer.windows(60, 90))
    page.inner.wait_for_function("document.querySelector('.range').innerText === 'steps 0 to 89'", timeout=60_000)
    page.after(writer.close)
    page.inner.wait_for_function("document.querySelector('.pill').innerText === 'finished'", timeout=60_000)


def test_a_run_that_begins_later_appears_by_itself(tab, serve, tmp_path):
    (tmp_path / "runs").mkdir()
    Writer(tmp_path / "runs" / "empty", Run.synthetic(3))
    page = tab().go(serve(tmp_path / "runs"))
    assert page.text("h1") == "No steps recorded yet"
    Writer(tmp_path / "runs" / "second", Run.synthetic(9)).windows(0, 9).close()
    run = page.frame.get_by_label("Run", exact=True)
    run.locator("option", has_text="second").wait_for(state="attached", timeout=60_000)


@pytest.mark.parametrize("reader", [["--load_fast=true"], ["--load_fast=false"], ["--samples_per_plugin=trainrt=2"]])
def test_every_window_is_there_with_every_reader(tab, serve, tmp_path, reader):
    run = Run.synthetic(3000, ["a/kernel"])
    writer = Writer(tmp_path / "one", run)
    for first in range(0, 3000, 10):
        writer.windows(first, first + 10)
    writer.close()
    page = tab().go(serve(tmp_path, *reader))
    count = page.inner.evaluate("fetch('./api/run?run=one').then(r => r.json())")["windows"]
    assert count == 3000


def test_every_window_is_there_where_only_tensorboard_has_the_logs(tab, serve, tmp_path):
    run = Run.synthetic(3000, ["a/kernel"])
    writer = Writer(tmp_path / "one", run)
    for first in range(0, 3000, 10):
        writer.windows(first, first + 10)
    writer.close()
    page = tab().go(serve(tmp_path, f"--logdir_spec=here:{tmp_path}"))
    told = page.inner.evaluate("fetch('./api/run?run=here%2Fone').then(r => r.json())")
    assert (told["windows"], told["end"]["how"]) == (3000, "finished")


@pytest.mark.parametrize("reader", ["--load_fast=true", "--load_fast=false"])
@pytest.mark.parametrize("way", ["prefix", "proxy", "notebook"])
def test_the_page_is_the_same_below_another_address(tab, serve, tmp_path, way, reader):
    for name in ("one", "two"):
        Writer(tmp_path / name, Run.synthetic(60, ["a/kernel", "b/kernel"])).windows(0, 60).close()
    server = serve(tmp_path, reader, *(["--path_prefix=/team/board"] if way == "prefix" else []))
    where = server if way == "prefix" else serve(server)
    page = tab()
    if way == "notebook":
        page.go_around(f"{where.root}/notebook")
    else:
        page.go(where, "#trainrt&first=5&last=14")
        assert page.text(".range").startswith("steps 5 to 14")
    assert page.text("h1") == "No rule found a fault"
    page.after(lambda: page.frame.get_by_label("Compare with").select_option(index=1))
    assert "The losses are the same bits" in page.text(".reasons")
    page.after(lambda: page.frame.get_by_label("Statistic").select_option("weight_norm"))
    chart = page.frame.locator(MAP)
    chart.focus()
    page.after(lambda: chart.press("+"))
    assert page.text(".range").startswith("steps")


def test_what_the_machine_did_is_drawn_on_the_axis_of_the_steps(tab, serve, tmp_path):
    samples = {"step": [9, 29, 59], "cpu_cores": [1.5, 1.75, 1.25], "gpu0/utilisation": [0.5, 0.9, 0.7]}
    run = Run.synthetic(60, ["a/kernel"])
    writer = Writer(tmp_path / "one", run).windows(0, 60)
    writer.put(events.encode_document(Document("telemetry", 59, {"samples": samples, "cards": []})))
    writer.close()
    page = tab().go(serve(tmp_path))
    page.frame.get_by_text("Timings, norms and telemetry").click()
    charts = [page.frame.locator(f"canvas[aria-label^='{name}']") for name in ("Process, cores busy", "GPU 0, busy")]
    assert [chart.get_attribute("aria-label").partition("from ")[2] for chart in charts] == [
        "1.5 to 1.25",
        "50 % to 70 %",
    ]
    assert all(chart.is_visible() for chart in charts)


def test_the_first_picture_takes_one_answer(tab, serve, tmp_path):
    run = Run.synthetic(60, ["a/kernel", "b/kernel"])
    Writer(tmp_path / "one", run).windows(0, 60).close()
    page = tab()
    asked = []
    page.page.on("request", lambda r: asked.append(r.url.partition("/api/")[2].partition("?")[0]))
    page.go(serve(tmp_path), "#trainrt&group=weights&statistic=gradient_norm&first=5&last=14")
    assert list(filter(None, asked)) == ["first", "lines"]
    assert page.text(".range").startswith("steps 5 to 14")
    assert page.frame.get_by_label("Statistic").input_value() == "gradient_norm"


def test_zero_missing_and_nonfinite_have_colours_of_their_own(tab, serve, tmp_path):
    ratio = np.full((8, 4), 1e-3)
    ratio[:, 1], ratio[:, 2] = 0.0, np.nan
    broken = np.zeros((8, 4))
    broken[:, 3] = 0.1
    names = [f"{name}/kernel" for name in ("fine", "zero", "missing", "broken")]
    run = Run.synthetic(8, names, update_ratio=ratio, update_nonfinite_share=broken)
    Writer(tmp_path / "one", run).windows(0, 8).close()
    page = tab().go(serve(tmp_path))
    colours = [pixel(page, LEFT + 200, TOP + 34 * row + 17) for row in range(4)]
    assert max(colours[1]) < 40
    assert colours[3][0] > 180 > 60 > colours[3][1]
    assert len({tuple(c) for c in colours}) == 4


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_an_audit_finds_nothing_in_either_theme_at_either_width(tab, server, logdir, width, dark):
    page = tab(width=width, dark=dark)
    other = next(p for p in logdir.glob("healthy/*")).relative_to(logdir).as_posix()
    page.go(server, f"#trainrt&finding=0&versus={other}")
    theme = page.inner.evaluate("document.documentElement.dataset.theme")
    assert theme == ("dark" if dark else "light")
    background = page.inner.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == dark
    assert page.inner.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keep(f"{'dark' if dark else 'light'}-{width}")
    assert audit(page) == []


def test_the_theme_follows_tensorboards_switch(tab, server):
    page = tab().go(server)
    page.page.evaluate("document.body.classList.add('dark-mode')")
    page.inner.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert max(pixel(page, 4, 4)) < 60 or pixel(page, 4, 4) == [0, 0, 0]


def test_markup_from_a_run_is_shown_and_not_run(tab, serve, tmp_path):
    run = Run.synthetic(5, [f"{HOSTILE}/kernel"], environment={HOSTILE: HOSTILE, "model": {"name": HOSTILE}})
    finding = {"rule": HOSTILE, "severity": "error", "causes": [HOSTILE], "where": [f"{HOSTILE}/kernel"],
               "steps": [0, 4], "message": HOSTILE, "advice": [HOSTILE]}  # fmt: skip
    Writer(tmp_path / "one", run).windows(0, 5).close([finding])
    page = tab().go(serve(tmp_path))
    assert HOSTILE in page.text("h1")
    page.after(lambda: page.frame.locator(".findings button").first.click())
    page.frame.locator(MAP).hover(position={"x": 500, "y": 30})
    assert page.inner.evaluate("document.body.dataset.owned") is None
    assert page.inner.evaluate("document.images.length") == 0


def test_a_record_that_cannot_be_read_says_so(tab, serve, tmp_path):
    from trainrt.record import events

    writer = Writer(tmp_path / "newer", Run.synthetic(3))
    writer.file.write_bytes(b"")
    writer.put(events.encode_header())
    writer.put(events._encode_json("roster", {"version": 999, "roster": {}, "environment": {}}, 0, None))
    Writer(tmp_path / "good", Run.synthetic(9)).windows(0, 9).close()
    server = serve(tmp_path)
    page = tab().go(server, "#trainrt&run=newer")
    assert "version 999" in page.text(".status")
    page.after(lambda: page.frame.get_by_label("Run", exact=True).select_option("good"))
    assert page.frame.locator(MAP).is_visible()
    lost = tab().go(server, "#trainrt&run=gone&finding=7&first=900&rows=nothing&statistic=nothing&group=nothing")
    assert "gone is not here" in lost.text(".lost")
    assert lost.frame.locator(MAP).is_visible()


def test_a_report_opens_from_disk(browser, tab, logdir, tmp_path):
    found = Run.find(logdir)
    file = tmp_path / "report.html"
    report_html.write(file, [(path.parent.name, Run.open(path)) for path in found[::-1]])
    page = tab().page
    page.goto(file.as_uri())
    page.locator("body[data-ready]").wait_for(timeout=20_000)
    assert page.locator("h1").inner_text() == "Likely cause: clip too tight"
    page.locator(".findings button").first.click()
    page.get_by_label("Compare with").select_option(label="healthy")
    page.get_by_text("The losses first differ at step").wait_for()
    chart = page.locator(MAP)
    chart.focus()
    chart.press("+")
    page.wait_for_function("!document.querySelector('.range').innerText.startsWith('steps 0 to 134')")
    page.screenshot(path=tmp_path / "report.png", full_page=True)


def test_a_report_of_several_runs_opens_on_their_comparison(tab, tmp_path, monkeypatch):
    four_runs(tmp_path)
    monkeypatch.setattr(report_html, "PAIRS", 4)
    file, names = tmp_path / "report.html", ("base", "later", "other", "same")
    report_html.write(file, [(name, Run.open(tmp_path / name)) for name in names], compare=True)
    page = tab().page
    page.goto(file.as_uri())
    board = page.locator(".board tbody tr")
    board.nth(3).wait_for()
    assert [row.split()[0] for row in board.all_inner_texts()] == list(names)
    page.get_by_label("Baseline").select_option("later")
    note = page.locator("section:has(#compare-title) .problem")
    note.wait_for()
    assert note.inner_text() == "This report does not hold the comparison of same with later. TensorBoard shows it."
    assert [row.split()[0] for row in board.all_inner_texts()] == ["later", "base", "other"]
    rows = [row.split("\t") for row in page.locator(".passports tbody tr").all_inner_texts()]
    assert ["fit.clip", "2.0", "1.0", "1.0"] in rows


def test_copied_logs_are_the_same_run(tab, serve, logdir, tmp_path):
    shutil.copytree(next(logdir.glob("stagnating/*")), tmp_path / "copy")
    page = tab().go(serve(tmp_path / "copy"))
    assert page.text("h1") == "Likely cause: clip too tight"
