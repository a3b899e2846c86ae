"""The trace of a run as a user meets it: in TensorBoard's Profile tab, in a real browser."""

import gzip
import json
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest

from .conftest import SCREENSHOTS

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SCRIPT = """
import sys, trainrt, keras
(x, y), _ = trainrt.digits.load()
model = keras.Sequential(
    [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
trainrt.fit(model, x, y, epochs=2, clip=1.0, logdir=sys.argv[1], trace=(20, 30), verbose=0)
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile")
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, capture_output=True)
    return path


def ask(server, route, **query):
    url = f"{server.url}data/plugin/profile/{route}?{urllib.parse.urlencode(query)}"
    body = urllib.request.urlopen(url, timeout=120).read()
    return json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)


def test_the_profile_tab_shows_the_steps_and_the_phases(browser, serve, traced):
    server = serve(traced, plain=True)
    runs = ask(server, "runs")
    assert len(runs) == 1
    tools = ask(server, "run_tools", run=runs[0])
    assert {"overview_page", "trace_viewer@"} <= set(tools)
    host = ask(server, "hosts", run=runs[0], tag="overview_page")[0]
    tables = ask(server, "data", run=runs[0], tag="overview_page", host=host["hostname"])
    times = [float(t["p"]["steptime_ms_average"]) for t in tables if "steptime_ms_average" in t.get("p", {})]
    assert times[0] > 0

    context = browser.new_context(viewport={"width": 1500, "height": 950})
    try:
        page = context.new_page()
        page.goto(f"{server.url}#profile")
        page.get_by_role("tab", name="Profile").first.wait_for(timeout=60_000)
        for _ in range(240):  # the tab makes its frame without an address, and goes there later
            shown = [f for f in page.frames if "plugin/profile" in f.url]
            if shown and "Performance Summary" in shown[0].evaluate("document.body.innerText"):
                break
            page.wait_for_timeout(250)
        assert "overview_page" in shown[0].url
        text = shown[0].evaluate("document.body.innerText")
        assert "No step time measured" not in text
        keep(page, "profile-overview")
        page.goto(f"{server.url}data/plugin/profile/trace_viewer_index.html?{trace_query(runs[0], host['hostname'])}")
        for number, phase in enumerate(("input", "forward", "backward", "clip", "update", "statistics")):
            page.get_by_text(f"trainrt {number} {phase}").first.wait_for(timeout=60_000)
        keep(page, "profile-trace")
        page.goto(f"{server.url}#trainrt")
        link = page.frame_locator('iframe[src*="name=trainrt"]').get_by_role("link", name="Open the device trace")
        link.click(timeout=60_000)
        page.wait_for_url("**/#profile*")
    finally:
        context.close()


def keep(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def trace_query(run, host):
    """As the tab's own frame asks for a trace."""
    data = urllib.parse.urlencode({"run": run, "tag": "trace_viewer@", "host": host})
    return urllib.parse.urlencode(
        {"is_streaming": "true", "is_oss": "true", "trace_data_url": f"/data/plugin/profile/data?{data}"}
    )
