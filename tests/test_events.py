"""The laws of the wire: what is written reads back, and damage is never fatal and never a wrong number."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.compat.proto import event_pb2, types_pb2
from tensorboard.data import provider
from tensorboard.summary.writer.record_writer import RecordWriter

from trainrt.record import events, reading
from trainrt.record.run import Run
from trainrt.record.vocabulary import EARLIER_JOINTS, JOINT, MOMENTS, VERSION, Epoch, Moments, Record

RUN = Run.synthetic(
    steps=7,
    parameters=2,
    slots=("velocity",),
    gradient_norm=np.random.default_rng(0).exponential(size=(7, 2)),
    update_zero_share=[[0.0, 1.0]] * 7,
    loss=[1.0, 2.0, np.nan, 3.0, 4.0, 5.0, 6.0],
)
ROSTER = RUN.roster
RECORD = RUN._chunks[0]
CHUNKS = (RECORD[:3], RECORD[3:4], RECORD[4:])
EVENTS = (
    events.encode_header(),
    events.encode_roster(ROSTER, {"host": "here", "size": np.int64(3)}),
    events.encode_record(CHUNKS[0], ROSTER),
    events.encode_scalars(3, 1.0, {"batch_loss": 0.5}),
    events.encode_record(CHUNKS[1], ROSTER),
    events.encode_epoch(Epoch(0, 3, {"loss": np.float32(0.25), "val_loss": np.nan})),
    events.encode_record(CHUNKS[2], ROSTER),
    events.encode_findings([{"rule": "stalled", "steps": np.array([1, 2])}], 6),
    events.encode_text(6, 2.0, "findings", "# One"),
    events.encode_end("finished", "after 1 epoch", step=6, wall_time=5.0),
)
FRAMED = [events.frame(event) for event in EVENTS]
FILE = b"".join(FRAMED)


def read(path, data: bytes | None = None, **keywords):
    if data is not None:
        path.write_bytes(data)
    reader = reading.Reader(path, **keywords)
    return list(reader.read()), reader


def equal(stored, record: Record) -> bool:
    """Whether every number is the one that the writer wrote."""
    return (
        np.array_equal(stored.steps, record.steps)
        and np.array_equal(stored.wall_time, record.wall_time)
        and np.array_equal(stored.scalars, record.scalars, equal_nan=True)
        and np.array_equal(stored.joint, record.joint, equal_nan=True)
        and list(stored.moments) == list(record.moments)
        and all(
            np.array_equal(stored.moments[s], events.from_wire(events.to_wire(record.moments[s])), equal_nan=True)
            for s in record.moments
        )
    )


def windows_are_original(items) -> bool:
    firsts = {int(chunk.steps[0, 0]): chunk for chunk in CHUNKS}
    return all(equal(item, firsts[int(item.steps[0, 0])]) for item in items if isinstance(item, reading.StoredRecord))


# ------------------------------------------------------------------------------------------------------ round trips


def test_what_is_written_reads_back(tmp_path):
    items, reader = read(tmp_path / "file", FILE)
    opening, *chunks_and_more = items
    assert opening == reading.Opening(ROSTER, {"host": "here", "size": 3})
    chunks = [item for item in chunks_and_more if isinstance(item, reading.StoredRecord)]
    assert len(chunks) == len(CHUNKS)
    assert windows_are_original(chunks)
    (epoch,) = [item for item in items if isinstance(item, Epoch)]
    assert (epoch.epoch, epoch.step, epoch.logs["loss"]) == (0, 3, 0.25)
    assert np.isnan(epoch.logs["val_loss"])
    assert items[-2:] == [
        reading.Findings(6, [{"rule": "stalled", "steps": [1, 2]}]),
        reading.End("finished", "after 1 epoch", 5.0),
    ]
    assert (reader.offset, reader.pending, reader.problems) == (len(FILE), 0, [])


magnitudes = st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 3e4, 1e30, 3e38]) | st.floats(1e-30, 1e30)
values = st.tuples(magnitudes, st.sampled_from([-1.0, 1.0])).map(lambda pair: pair[0] * pair[1])
tensors = st.lists(values | st.sampled_from([np.nan, np.inf]), max_size=20).map(np.array)


def test_scalars_of_many_steps_are_encoded_as_those_of_each():
    values = {"train/loss": np.array([1.5, np.nan, 0.0]), "a": np.array([-np.inf, 3e38, 1e39])}
    steps, wall_times = np.array([0, 5, 1 << 40]), np.array([0.0, 1.25, 1e9])
    each = zip(steps.tolist(), wall_times.tolist(), range(3), strict=True)
    assert list(events.encode_scalars_of(steps, wall_times, values)) == [
        events.encode_scalars(step, wall_time, {tag: of[t] for tag, of in values.items()})
        for step, wall_time, t in each
    ]


@given(st.lists(tensors | st.none(), min_size=1, max_size=4))
def test_moments_come_back_to_two_in_ten_million(rows):
    unmeasured = np.full(len(MOMENTS), np.nan)
    original = Moments(np.stack([unmeasured if x is None else Moments.of(x).array for x in rows]))
    for moments in (original, original.merge(0)):
        back = Moments(events.from_wire(events.to_wire(moments.array)))
        for name in ("count", "zeros", "nonfinite"):
            np.testing.assert_array_equal(getattr(back, name), getattr(moments, name))
        for name in ("sumsq", "rms", "norm", "absmax", "mean", "sum", "peak_norm", "trough_norm"):
            # Under 1e-37 float32 has no full precision; a mean that small is cancellation of larger elements.
            np.testing.assert_allclose(
                getattr(back, name), getattr(moments, name), rtol=2.5e-7, atol=1e-44, err_msg=name
            )


@pytest.mark.parametrize("column", ["zeros", "nonfinite"])
@pytest.mark.parametrize("count", [1.0, 7.0, 1e8, 123456789.0])
def test_none_one_all_but_one_and_all_stay_apart(column, count):
    row = np.zeros((4, len(MOMENTS)))
    row[:, MOMENTS.index("count")] = count
    row[:, MOMENTS.index(column)] = 0, 1, count - 1, count
    share = getattr(
        Moments(events.from_wire(events.to_wire(row))),
        column[:-1] + "_share" if column == "zeros" else "nonfinite_share",
    )
    assert share[0] == 0
    assert share[1] > 0
    assert share[2] < 1
    assert share[3] == 1
    np.testing.assert_allclose(share, np.array([0, 1, count - 1, count]) / count, rtol=1e-7, atol=0)


def test_an_element_that_float64_alone_can_hold_reads_as_infinite_and_not_as_a_wrong_number():
    back = Moments(events.from_wire(events.to_wire(Moments.of(np.array([1e200, 1.0])).array)))
    assert back.absmax == np.inf
    assert back.rms == np.inf


def test_frames_are_those_of_tensorboard():
    out = io.BytesIO()
    writer = RecordWriter(out)
    for event in EVENTS:
        writer.write(event)
    assert out.getvalue() == FILE


def test_a_slice_of_a_stored_chunk_is_that_of_its_record(tmp_path):
    items, _ = read(tmp_path / "file", FILE)
    stored = next(item for item in items if isinstance(item, reading.StoredRecord))
    for windows in (slice(1, 3), slice(0, 1), slice(3, 3), slice(-2, None)):
        assert equal(stored[windows], CHUNKS[0][windows])
        assert equal(stored[windows].load(), CHUNKS[0][windows])


def test_a_record_that_does_not_fit_its_roster_is_not_written():
    without = dataclasses.replace(RECORD, moments={"gradient": RECORD.moments["gradient"]})
    for record, message in (
        (RECORD[:0], "at least one window"),
        (without, "every subject"),
        (dataclasses.replace(RECORD, joint=RECORD.joint[:, :1]), "`joint` of a chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            events.encode_record(record, ROSTER)


# ---------------------------------------------------------------------------------------------------------- damage


def test_a_file_cut_off_anywhere_gives_just_the_whole_records_before(tmp_path):
    ends = np.cumsum([len(framed) for framed in FRAMED])
    counts = [len(read(tmp_path / "file", FILE[:end])[0]) for end in ends]
    path = tmp_path / "file"
    path.write_bytes(FILE)
    for cut in range(len(FILE) - 1, -1, -1):
        with path.open("r+b") as file:
            file.truncate(cut)
        items, reader = read(path)
        whole = int(np.searchsorted(ends, cut, side="right"))
        assert len(items) == (counts[whole - 1] if whole else 0)
        assert reader.pending == cut - (ends[whole - 1] if whole else 0)
        assert bool(reader.problems) == bool(reader.pending)
        if cut % 97 == 0:
            assert windows_are_original(items)


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(0, len(FILE) * 8 - 1), min_size=1, max_size=4))
def test_flipped_bits_lose_records_and_never_change_one(tmp_path_factory, bits):
    data = bytearray(FILE)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    items, reader = read(tmp_path_factory.getbasetemp() / "flipped", bytes(data))
    assert reader.problems
    assert windows_are_original(items)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(FILE)))
def test_bytes_that_were_never_ours_are_not_fatal(tmp_path_factory, noise, at):
    items, _ = read(tmp_path_factory.getbasetemp() / "noise", FILE[:at] + noise + FILE[at:])
    assert windows_are_original(items)


def test_a_damaged_event_is_skipped_and_the_rest_is_read(tmp_path):
    damaged = bytearray(FRAMED[2])
    damaged[40] ^= 1
    items, reader = read(tmp_path / "file", b"".join([*FRAMED[:2], damaged, *FRAMED[3:]]))
    assert [len(item) for item in items if isinstance(item, reading.StoredRecord)] == [1, 3]
    assert windows_are_original(items)
    assert (reader.skipped, len(reader.problems)) == (1, 1)
    assert f"Byte {len(FRAMED[0]) + len(FRAMED[1])}:" in reader.problems[0]


def test_a_damaged_length_ends_the_reading_and_says_what_is_lost(tmp_path):
    damaged = bytearray(FRAMED[4])
    damaged[0] ^= 1
    items, reader = read(tmp_path / "file", b"".join([*FRAMED[:4], damaged, *FRAMED[5:]]))
    assert [len(item) for item in items if isinstance(item, reading.StoredRecord)] == [3]
    assert str(sum(map(len, FRAMED[4:]))) in reader.problems[0]


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1])
def test_a_length_beyond_the_file_is_awaited_and_not_allocated(tmp_path, length):
    head = length.to_bytes(8, "little")
    checksum = events.masked(head).to_bytes(4, "little")
    items, reader = read(tmp_path / "file", FRAMED[0] + FRAMED[1] + head + checksum + b"x" * 50)
    assert len(items) == 1
    assert reader.pending == 62


def test_a_record_too_long_to_be_ours_is_passed_over_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 2000)
    long = events.frame(events.encode_text(0, 0.0, "note", "x" * 3000))
    items, reader = read(tmp_path / "file", FRAMED[0] + FRAMED[1] + long + FRAMED[4])
    assert len(items) == 2
    assert reader.skipped == 1


def mutated(event: bytes, change) -> bytes:
    proto = event_pb2.Event.FromString(event)
    change({value.tag.removeprefix("trainrt/"): value for value in proto.summary.value}, proto)
    return proto.SerializeToString()


def _reshape(name, *shape):
    def change(values, _):
        del values[name].tensor.tensor_shape.dim[:]
        for size in shape:
            values[name].tensor.tensor_shape.dim.add(size=size)

    return change


def _set(name, **fields):
    def change(values, _):
        for field, value in fields.items():
            setattr(values[name].tensor, field, value)

    return change


HOSTILE_CHUNKS = {
    "no windows": _reshape("steps", 0, 2),
    "negative windows": _reshape("steps", -1, 2),
    "steps of rank 1": _reshape("steps", 6),
    "very many windows": _reshape("steps", 1 << 62, 2),
    "more windows than rows": _reshape("steps", 4, 2),
    "fewer parameters": _reshape("joint", 3, 1, len(JOINT)),
    "an overflowing shape": _reshape("scalars", 1 << 32, 1 << 32, 1 << 32),
    "short content": _set("moments/update", tensor_content=b"1234"),
    "no content": _set("moments/update", tensor_content=b""),
    "another dtype": _set("moments/update", dtype=types_pb2.DT_DOUBLE),
    "strings": _set("joint", dtype=types_pb2.DT_STRING),
    "steps backwards": _set("steps", tensor_content=np.array([[5, 5], [4, 4], [3, 3]]).tobytes()),
    "no scalars": lambda values, _: setattr(values["scalars"], "tag", "trainrt/other"),
}


@pytest.mark.parametrize("name", HOSTILE_CHUNKS)
def test_a_chunk_that_is_not_what_its_roster_says_is_skipped(tmp_path, name):
    hostile = events.frame(mutated(EVENTS[2], HOSTILE_CHUNKS[name]))
    items, reader = read(tmp_path / "file", FRAMED[0] + FRAMED[1] + hostile + FRAMED[4])
    assert [len(item) for item in items if isinstance(item, reading.StoredRecord)] == [1]
    assert reader.skipped == 1


HOSTILE_TEXTS = ["", "{", "null", "[]", "[1]", "{}", "[" * 100000, "1" * 5000, '{"version": 1}', "\xff", '{"logs": 3}']


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
@pytest.mark.parametrize("at", [1, 5, 7, 9])
def test_a_text_that_makes_no_sense_is_skipped(tmp_path, text, at):
    def change(values, _):
        (value,) = values.values()
        value.tensor.string_val[0] = text.encode("latin1")

    hostile = events.frame(mutated(EVENTS[at], change))
    items, reader = read(tmp_path / "file", hostile + FRAMED[1] + FRAMED[4])
    expected = (1, 0) if at == 7 and text == "[]" else (0, 1)  # an empty list is a list of findings
    assert (len(items) - 2, reader.skipped) == expected


def _change_roster(**changes) -> bytes:
    def change(values, _):
        content = json.loads(values["roster"].tensor.string_val[0])
        content["roster"]["parameters"][0].update(changes)
        values["roster"].tensor.string_val[0] = json.dumps(content).encode()

    return events.frame(mutated(EVENTS[1], change))


@pytest.mark.parametrize("changes", [{"shape": [-1]}, {"shape": ["x"]}, {"shape": [1.5]}, {"path": 3}, {"layer": None}])
def test_a_roster_that_makes_no_sense_is_skipped(tmp_path, changes):
    items, reader = read(tmp_path / "file", _change_roster(**changes) + FRAMED[1] + FRAMED[2])
    assert (len(items), reader.skipped) == (2, 1)


def test_a_second_roster_is_skipped_unless_it_is_the_same(tmp_path):
    items, reader = read(tmp_path / "file", FRAMED[1] + FRAMED[1] + _change_roster(path="other") + FRAMED[2])
    assert (len(items), reader.skipped) == (2, 1)


def test_windows_before_the_roster_are_skipped(tmp_path):
    items, reader = read(tmp_path / "file", FRAMED[0] + FRAMED[2] + FRAMED[1] + FRAMED[4])
    assert (len(items), reader.skipped) == (2, 1)
    assert "without a roster" in reader.problems[0]


def test_many_problems_are_counted_and_few_are_listed(tmp_path):
    _, reader = read(tmp_path / "file", FRAMED[2] * 100)
    assert reader.skipped == 100
    assert len(reader.problems) < 30
    assert "80 more" in reader.problems[-1]


def test_a_newer_version_is_refused_with_the_remedy(tmp_path):
    def change(values, _):
        content = json.loads(values["roster"].tensor.string_val[0])
        content["version"] = VERSION + 1
        values["roster"].tensor.string_val[0] = json.dumps(content).encode()

    newer = events.frame(mutated(EVENTS[1], change))
    with pytest.raises(ValueError, match=rf"up to version {VERSION}.*version {VERSION + 1}.*pip install --upgrade"):
        read(tmp_path / "file", FRAMED[0] + newer)


@pytest.mark.parametrize("columns", EARLIER_JOINTS.values(), ids=len)
def test_a_record_of_earlier_days_reads_with_nan_for_what_it_did_not_know(tmp_path, monkeypatch, columns):
    places = [JOINT.index(name) for name in columns]
    with monkeypatch.context() as then:
        then.setattr(events, "JOINT", columns)
        old = events.encode_record(dataclasses.replace(RECORD, joint=RECORD.joint[..., places]), ROSTER)
    items, reader = read(tmp_path / "file", b"".join([*FRAMED[:2], events.frame(old)]))
    assert not reader.problems
    expected = np.full_like(RECORD.joint, np.nan)
    expected[..., places] = RECORD.joint[..., places]
    np.testing.assert_array_equal(items[-1].joint, expected)
    np.testing.assert_array_equal(items[-1][2:].joint, expected[2:])


def test_a_file_cut_short_while_it_is_open_is_an_error_and_not_a_number(tmp_path):
    items, _ = read(tmp_path / "file", FILE)
    (tmp_path / "file").write_bytes(FILE[:500])
    with pytest.raises(OSError, match="cut short"):
        _ = items[1].moments["weight"]


# --------------------------------------------------------------------------------------------------------- tailing


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, len(FILE)), max_size=12))
def test_a_file_read_while_it_grows_gives_each_item_once(tmp_path_factory, cuts):
    path = tmp_path_factory.getbasetemp() / "growing"
    path.write_bytes(b"")
    reader, items = reading.Reader(path), []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(FILE)], strict=True):
        with path.open("ab") as file:
            file.write(FILE[start:stop])
        items += reader.read()
    assert len(items) == len(read(path)[0])
    assert windows_are_original(items)
    assert reader.problems == []


def test_a_reader_goes_on_where_another_stopped(tmp_path):
    _, first = read(tmp_path / "file", b"".join(FRAMED[:3]) + b"torn")
    items, second = read(tmp_path / "file", FILE, offset=first.offset, roster=first.roster)
    assert [len(item) for item in items if isinstance(item, reading.StoredRecord)] == [1, 3]
    assert windows_are_original(items)
    assert second.problems == []


# -------------------------------------------------------------------------------------------------------- neighbours


def test_events_of_others_are_skipped_even_under_our_tags(tmp_path):
    def change(values, _):
        for value in values.values():
            value.metadata.plugin_data.plugin_name = "other"

    items, reader = read(tmp_path / "file", FRAMED[1] + events.frame(mutated(EVENTS[2], change)) + FRAMED[4])
    assert (len(items), reader.problems) == (2, [])


def test_tensorboard_sees_every_tag(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / events.file_name()).write_bytes(FILE)
    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"trainrt": 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    board = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    ours = board.list_tensors(context.RequestContext(), experiment_id="", plugin_name=events.PLUGIN)["run"]
    moments = {f"trainrt/moments/{subject}" for subject in ROSTER.subjects}
    others = {
        f"trainrt/{name}" for name in ("roster", "steps", "wall_time", "joint", "scalars", "epoch", "findings", "end")
    }
    assert set(ours) == moments | others
    tags = provider.RunTagFilter(runs=["run"], tags=["trainrt/steps"])
    steps = board.read_tensors(
        context.RequestContext(), experiment_id="", plugin_name=events.PLUGIN, downsample=1000, run_tag_filter=tags
    )["run"]["trainrt/steps"]
    np.testing.assert_array_equal(np.concatenate([datum.numpy for datum in steps]), RECORD.steps)
    assert [datum.step for datum in steps] == [int(chunk.steps[0, 0]) for chunk in CHUNKS]
    assert set(board.list_scalars(context.RequestContext(), experiment_id="", plugin_name="scalars")["run"]) == {
        "batch_loss"
    }
    assert set(board.list_tensors(context.RequestContext(), experiment_id="", plugin_name="text")["run"]) == {
        "findings"
    }


def test_reading_needs_neither_tensorflow_nor_keras():
    loaded = "{m.split('.')[0] for m in sys.modules}"
    code = f"import sys, trainrt.record.run; print(sorted({{'tensorflow', 'keras'}} & {loaded}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
