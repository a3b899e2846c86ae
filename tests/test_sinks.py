"""What TensorBoard's own pages find in a run's file, without trainrt's page."""

import re

import numpy as np
import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.data import provider
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from trainrt.record.run import Run
from trainrt.record.vocabulary import Epoch, Parameter
from trainrt.sinks.tensorboard import TensorBoard, dashboard

PASSPORT = {"precision": "float32", "optimizer": {"class": "SGD", "config": {"momentum": 0.9}}, "fit": {"clip": 0.5}}
KERNELS = [Parameter(f"{i}/kernel", str(i), (4, 4), "float32") for i in range(5)]


@pytest.fixture
def run():
    ratio = np.geomspace(1e-6, 1e-2, 5) * np.ones((12, 1))
    ratio[:, 4] = 0.0
    scalars = {"gradient_norm": 1.0, "clipped_gradient_norm": 0.5, "step_s": 0.1}
    return Run.synthetic(12, KERNELS, update_ratio=ratio, scalars=scalars)


@pytest.fixture
def written(tmp_path, run):
    """TensorBoard's own view of a run that the sink wrote."""
    (tmp_path / "one").mkdir()
    sink = TensorBoard(tmp_path / "one")
    sink.open(run.roster, PASSPORT)
    sink.write(run._chunks[0][:6])
    sink.write(run._chunks[0][6:])
    sink.write(Epoch(0, 11, {"loss": 1.0, "val_accuracy": 0.75}))
    sink.close([], {"how": "finished", "step": 11})
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    return data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))


def tags_of(written, plugin, kind="tensors"):
    listing = getattr(written, f"list_{kind}")(RequestContext(), experiment_id="", plugin_name=plugin)
    return listing["one"]


def values_of(written, plugin, tag):
    chosen = provider.RunTagFilter(runs=["one"], tags=[tag])
    read = written.read_tensors(
        RequestContext(), experiment_id="", plugin_name=plugin, downsample=1000, run_tag_filter=chosen
    )
    return [datum.numpy for datum in read["one"][tag]]


def test_every_chart_of_the_layout_has_its_scalars(written, run):
    [(tag, _)] = tags_of(written, "custom_scalars").items()
    [text] = values_of(written, "custom_scalars", tag)
    layout = layout_pb2.Layout.FromString(text.item())
    tags = set(dashboard(run._chunks[0], run.roster))
    assert tags <= set(tags_of(written, "scalars", "scalars"))
    for chart in layout.category[0].chart:
        patterns = [*chart.multiline.tag, *(re.escape(s.value) for s in chart.margin.series)]
        assert patterns
        for pattern in patterns:
            assert any(re.search(pattern, tag) for tag in tags), pattern


def test_hparams_are_the_passports_and_metrics_those_of_the_epochs(written):
    data = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(series.plugin_content)
        for tag, series in tags_of(written, "hparams").items()
    }
    [start] = [d.session_start_info for d in data.values() if d.HasField("session_start_info")]
    [shape] = [d.experiment for d in data.values() if d.HasField("experiment")]
    [end] = [d.session_end_info for d in data.values() if d.HasField("session_end_info")]
    assert start.hparams["optimizer.momentum"].number_value == 0.9
    assert start.hparams["clip"].number_value == 0.5
    assert {metric.name.tag for metric in shape.metric_infos} == {"epoch/loss", "epoch/val_accuracy"}
    assert end.status == 1, "success"


def test_the_histogram_counts_every_kernel_that_moved(written, run):
    tables = values_of(written, "histograms", "update_ratio/log10")
    assert len(tables) == 2, "one a delivery"
    for table in tables:
        assert table[:, 2].sum() == 4
        assert table[0, 0] == pytest.approx(-6, abs=1e-4)
        assert table[-1, 1] == pytest.approx(np.log10(run["update_ratio"][0, 3]), abs=1e-4)


def test_a_run_that_goes_on_in_the_same_second_overwrites_nothing(tmp_path):
    files = [TensorBoard(tmp_path).path for _ in range(3)]
    assert len(set(files)) == 3
    assert sorted(files) == files
