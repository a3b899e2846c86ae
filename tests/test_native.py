"""The library is found, or built, or a line says why not; and nothing doubtful is ever loaded."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainrt.update import native, native_ops

FAKE = """#!{python}
import sys, time
if "--version" in sys.argv:
    print("fake 1.0")
else:
    time.sleep(0.05)
    open(sys.argv[sys.argv.index("-o") + 1], "wb").write(repr(time.time_ns()).encode())
"""
BROKEN = """#!{python}
import sys
if "--version" in sys.argv:
    print("broken 1.0")
else:
    sys.exit(print("cpu.cc:7: error: no such instruction", file=sys.stderr) or 1)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for one test, and no environment from outside."""
    for name in ("TRAINRT_NATIVE", "TRAINRT_KERNELS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRAINRT_CACHE", str(tmp_path / "cache"))
    native._load.cache_clear()
    yield tmp_path / "cache"
    native._load.cache_clear()


def compiler(tmp_path, monkeypatch, text):
    """Stands in for the C++ compiler."""
    path = tmp_path / "compiler"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def found():
    return native._search(native._compiler())


def test_what_is_built_is_found_again_and_not_built_twice(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    library = native.build()
    assert found() == (library, None)
    assert native.build() == library
    assert native.build(force=True) != library


def test_the_cache_is_private(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    native.build()
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "renamed"])
def test_a_damaged_library_is_never_found(cache, tmp_path, monkeypatch, damage):
    compiler(tmp_path, monkeypatch, FAKE)
    library = native.build()
    content = library.read_bytes()
    if damage == "renamed":
        library.rename(library.with_name(library.name.replace(native._digest(library), "0" * 32)))
    else:
        library.write_bytes({"truncated": content[:-1], "empty": b"", "changed": content[:-1] + b"!"}[damage])
    assert found() == (None, None)


def test_a_library_for_something_else_is_never_found(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    native.build()
    for name, value in (
        ("processor", lambda: "another"),
        ("sources", lambda: tmp_path),
        ("_ALWAYS", (*native._ALWAYS, "-g")),
        ("_ARITHMETIC", ("-O2",)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(native, name, value)
            assert found() == (None, None), name
    compiler(tmp_path, monkeypatch, FAKE.replace("fake 1.0", "fake 1.1"))
    native.describe.cache_clear()
    assert found() == (None, None)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_nothing_is_loaded_from_where_others_write(cache, tmp_path, monkeypatch, mode):
    compiler(tmp_path, monkeypatch, FAKE)
    native.build()
    cache.chmod(mode)
    assert native.load() is None
    assert "can be written by others" in native.status().reason
    with pytest.raises(native.BuildError, match="can be written by others"):
        native.build()


def test_a_library_that_others_may_write_is_never_found(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    native.build().chmod(0o666)
    assert found() == (None, None)


def test_nothing_is_loaded_from_another_user(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    native.build()
    if os.geteuid() == 0:
        os.chown(cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert native.load() is None
    assert "belongs to another user" in native.status().reason


def test_without_a_compiler_one_line_says_what_is_lost_and_what_helps(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert native.load() is None
    reason = native.status().reason
    assert "No C++ compiler" in reason
    assert "slower" in reason
    assert "Install g++" in reason
    assert "\n" not in reason
    with pytest.raises(RuntimeError, match="No C\\+\\+ compiler"):
        native_ops.measure([0.0])


def test_without_a_place_to_write_one_line_says_so(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRAINRT_CACHE", str(tmp_path / "file" / "cache"))
    assert native.load() is None
    assert "cannot be made (Not a directory)" in native.status().reason
    assert "TRAINRT_CACHE" in native.status().reason


def test_a_failed_build_says_why_and_leaves_nothing(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, BROKEN)
    assert native.load() is None
    assert "cpu.cc:7: error: no such instruction" in native.status().reason
    assert list(cache.iterdir()) == []


def test_what_does_not_load_says_so(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    assert native.load() is None
    assert "does not load" in native.status().reason


def test_it_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", "0")
    assert native.load() is None
    assert "TRAINRT_NATIVE=0" in native.status().reason
    assert not cache.exists()


def test_the_status_builds_nothing(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    status = native.status()
    assert status.path is None
    assert "not built yet" in status.reason
    assert status.compiler == "fake 1.0"
    assert not cache.exists()


def test_builds_at_once_leave_whole_libraries(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    with ThreadPoolExecutor(8) as pool:
        libraries = set(pool.map(lambda _: native.build(force=True), range(8)))
    assert set(cache.iterdir()) == libraries
    assert all(p.stem.endswith(native._digest(p)) for p in libraries)
    assert found()[0] in libraries


def test_what_a_dead_build_left_is_swept(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    left = cache / "build-dead"
    left.mkdir(parents=True)
    cache.chmod(0o700)
    os.utime(left, (0, 0))
    native.build()
    assert not left.exists()


def test_cleaning_removes_every_library(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, FAKE)
    library = native.build()
    assert native.clean() == [library]
    assert list(cache.iterdir()) == []
    assert native.clean() == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_library_made_ahead_is_found_without_a_compiler(cache, tmp_path, monkeypatch, whole):
    target = list(native._targets())[-1]
    compiler(tmp_path, monkeypatch, FAKE)
    library = native.build(target=target, directory=tmp_path / "ahead")
    monkeypatch.setenv("TRAINRT_KERNELS", str(tmp_path / "ahead" if whole else library))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert found() == (library, None)


def test_importing_compiles_nothing(cache, tmp_path):
    environment = {**os.environ, "CXX": shutil.which("false"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    code = "import trainrt.update.native, trainrt.update.fused"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not cache.exists()


@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler")
def test_the_real_library_builds_loads_and_measures(cache):
    shows = "print(native_ops.measure([[3.0, -4.0]]).numpy().tolist(), native.status().built)"
    code = f"from trainrt.update import native, native_ops; {shows}"
    for built in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.stdout.strip() == f"[[2.0, -1.0, 25.0, 4.0, 0.0, 0.0]] {built}"
