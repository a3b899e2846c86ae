"""Checkpoints that survive being killed at any moment: written whole or not at all, verified, the one before at hand.

They are TensorFlow's own, `tf.train.Checkpoint` and `CheckpointManager`, of host copies: training waits for the copy,
and a thread writes it. One checkpoint holds

- `arrays`: every variable of the training, the position in the data, what callbacks remember;
- `meta`: JSON that says which array is what, with the plain values;
- `digest`: `digest_all` of the arrays and of that JSON.

TensorFlow's files carry checksums by themselves; the digest covers what happened before and between them. Nothing in a
checkpoint is unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainrt.record.digest import digest_all

NAME = "trainrt"
VERSION = 1
SOURCES = (None, "skip")
_ARRAY = "__array__"
_FILE = re.compile(rf"{NAME}-(\d+)\.index")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where, when and how many checkpoints `fit` writes; the same call after a death goes on from the newest.

    Attributes:
      directory: A directory for the checkpoints of this one training.
      every: "epoch" after each epoch; an int n after every n-th step too, a `datetime.timedelta` after so much time.
      keep: How many to keep. More than one, so that a damaged one has one before it.
      source: How to go back into the data. None: by the order of arrays or the state of a `tf.data` iterator; other
        sources are refused. "skip": reads the batches that were trained on once more and drops them, which is right for
        a generator or a `PyDataset` that gives the same batches in every run.

    Raises:
      TypeError, ValueError: An attribute is not one of these.
    """

    directory: str | os.PathLike
    every: str | int | datetime.timedelta = "epoch"
    keep: int = 3
    source: str | None = None

    def __post_init__(self):
        if not isinstance(self.directory, (str, os.PathLike)) or not os.fspath(self.directory):
            raise TypeError(f"A checkpoint's directory must be a path. Received: directory={self.directory!r}.")
        every = self.every
        steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        span = isinstance(every, datetime.timedelta) and every.total_seconds() > 0
        if not (every == "epoch" or steps or span):
            raise ValueError(
                '`every` must be "epoch", a number of steps from 1 on, or a datetime.timedelta. '
                f"Received: every={every!r}."
            )
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"`keep` must be a number of checkpoints from 1 on. Received: keep={self.keep!r}.")
        if self.source not in SOURCES:
            raise ValueError(f"`source` must be one of {SOURCES}. Received: source={self.source!r}.")


def resolve(checkpoint: Any) -> Checkpoint | None:
    """The argument of `fit` as a `Checkpoint`.

    Raises:
      TypeError: Neither None, nor a path, nor a `Checkpoint`.
    """
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    if isinstance(checkpoint, (str, os.PathLike)):
        return Checkpoint(checkpoint)
    raise TypeError(
        f"`checkpoint` must be a directory, a trainrt.Checkpoint or None. Received: checkpoint={checkpoint!r}."
    )


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified.

    Attributes:
      path: Of the files, without their endings.
      meta: What `Store.save` was given, arrays in their places.
    """

    path: Path
    meta: dict[str, Any]


class Store:
    """The checkpoints of a directory.

    Args:
      directory: Is made when it is not there.
      keep: How many to keep.

    Raises:
      OSError: It cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, keep: int):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK):
                raise PermissionError(f"no permission to write in {self.directory}")
        except OSError as error:
            raise type(error)(
                f"Checkpoints cannot be written. Received: {str(directory)!r}: {error}. "
                "Pass a directory that you may write, which need not be there."
            ) from error
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None
        self._warned = False
        self._arrays: list[tf.Variable] = []
        self._texts: list[tf.Variable] = []
        self._manager: tf.train.CheckpointManager | None = None
        self._number = max((number for number, _ in self._found()), default=0)

    def _found(self) -> list[tuple[int, Path]]:
        """All checkpoints that have an index, the newest first: TensorFlow's own list may be damaged too."""
        found = [(int(m[1]), p.with_suffix("")) for p in self.directory.iterdir() if (m := _FILE.fullmatch(p.name))]
        return sorted(found, reverse=True)

    def newest(self, at_most: int | None = None) -> Saved | None:
        """The newest checkpoint that is whole; warns of each newer one that is not. None: there is none at all.

        Args:
          at_most: Only those of this step or an earlier one, and None where there are none such.

        Raises:
          ValueError: There are checkpoints, but none of them is whole; or one is of a newer version.
        """
        found = self._found()
        for _, path in found:
            try:
                saved = Saved(path, _read(path))
                if at_most is None or saved.meta["step"] <= at_most:
                    return saved
            except _NewerVersion:
                raise
            except Exception as error:  # whatever TensorFlow says of damaged files
                warnings.warn(
                    f"trainrt: the checkpoint {path} is damaged, the one before it is used. {_brief(error)}",
                    stacklevel=3,
                )
        if found and at_most is None:
            raise ValueError(
                f"None of the {len(found)} checkpoints in {self.directory} can be read. "
                "Pass another directory, or remove these files to begin anew."
            )
        return None

    def save(self, meta: Mapping[str, Any], before: Callable[[str], Any] = lambda digest: None) -> None:
        """Writes a checkpoint on a thread of its own; waits for the one before, if that is not done.

        Args:
          meta: Values that JSON knows, and arrays anywhere among them, which nobody changes from now on.
          before: Called on the thread with the digest before the files are written, for what has to be on disk earlier.
        """
        self.wait()
        self._number += 1
        arguments = (self._number, meta, before)
        self._thread = threading.Thread(target=self._write, args=arguments, name="trainrt-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last checkpoint is written; warns, once in a run, if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"trainrt: a checkpoint could not be written, training goes on. The newest whole one is kept in "
                f"{self.directory}; this is said once. {_brief(self._failed)}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _write(self, number: int, meta: Mapping[str, Any], before: Callable[[str], Any]) -> None:
        try:
            arrays: list[np.ndarray] = []
            text = json.dumps({"version": VERSION, **_packed(meta, arrays)}).encode()
            digest = _digest(arrays, text)
            before(digest)
            self._put(arrays, text, digest)
            assert self._manager is not None
            self._manager.save(checkpoint_number=number)
            self._failed, self._warned = None, False
        except Exception as error:  # a full disk must not end the training
            self._failed = error
            self._remove(number)

    def _put(self, arrays: Sequence[np.ndarray], text: bytes, digest: str) -> None:
        """The values into variables on the host, which are made anew when their shapes have changed."""
        with tf.device("CPU:0"):
            same = len(arrays) == len(self._arrays) and all(
                a.shape == v.shape and v.dtype == a.dtype for a, v in zip(arrays, self._arrays, strict=True)
            )
            if same:
                for variable, array in zip((*self._arrays, *self._texts), (*arrays, text, digest), strict=True):
                    variable.assign(array)
                return
            self._arrays = [tf.Variable(array, trainable=False) for array in arrays]
            self._texts = [tf.Variable(value, trainable=False) for value in (text, digest)]
        checkpoint = tf.train.Checkpoint(arrays=self._arrays, meta=self._texts[0], digest=self._texts[1])
        self._manager = tf.train.CheckpointManager(checkpoint, str(self.directory), self._keep, checkpoint_name=NAME)

    def _remove(self, number: int) -> None:
        """What a save that failed has left."""
        for path in self.directory.glob(f"{NAME}-{number}[._]*"):
            with contextlib.suppress(OSError):
                if path.is_dir():
                    for inner in path.iterdir():
                        inner.unlink()
                    path.rmdir()
                else:
                    path.unlink()


class _NewerVersion(ValueError):
    pass


def _read(path: Path) -> dict[str, Any]:
    reader = tf.train.load_checkpoint(str(path))
    text = _get(reader, "meta")
    content = json.loads(text)
    if content["version"] > VERSION:
        raise _NewerVersion(
            f"This trainrt reads checkpoints up to version {VERSION}. Received: {content['version']} in {path}. "
            "Update it: pip install --upgrade trainrt."
        )
    shapes = reader.get_variable_to_shape_map()
    count = sum(name.startswith("arrays/") for name in shapes)
    arrays = [np.asarray(_get(reader, f"arrays/{i}")) for i in range(count)]
    if _digest(arrays, text) != _get(reader, "digest").decode():
        raise ValueError("Its digest is not that of its content.")
    return _unpacked(content, arrays)


def _get(reader, name: str) -> Any:
    return reader.get_tensor(f"{name}/.ATTRIBUTES/VARIABLE_VALUE")


def _digest(arrays: Sequence[np.ndarray], text: bytes) -> str:
    return digest_all([*arrays, np.frombuffer(text, np.uint8)])


def _packed(value: Any, arrays: list[np.ndarray]) -> Any:
    """The value with each array appended to `arrays` and its number in its place."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _packed(inner, arrays) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(inner, arrays) for inner in value]
    return value


def _unpacked(value: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _unpacked(inner, arrays) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unpacked(inner, arrays) for inner in value]
    return value


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
