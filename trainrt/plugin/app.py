"""The plugin: routes that answer what the page asks about a run, and nothing else.

| route      | asks                                             | answer                                         |
|------------|--------------------------------------------------|------------------------------------------------|
| `first`    | what `map` asks, as far as it is known           | all that is drawn first: runs, run, map, scalars |
| `runs`     |                                                  | names, the newest first                        |
| `run`      | run                                              | JSON: `summary.summary`, or what is wrong      |
| `pulse`    | run                                              | JSON: how far it has come; cheap, asked often  |
| `map`      | run, group, statistic, first, last, columns      | planes of codes [C, R], see `wire`             |
| `lines`    | run, group, rows, statistics, first, last, columns | float32 [C, rows] each                       |
| `scalars`  | run, first, last, columns                        | float32 [C] each                               |
| `compare`  | run, versus                                      | JSON: passports' difference, first divergence  |
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from tensorboard.backend import experiment_id, http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from trainrt.plugin import answers
from trainrt.plugin.answers import Refused
from trainrt.plugin.files import MIME, digest, static_files
from trainrt.plugin.sources import Files, Loaded, Source, local
from trainrt.plugin.summary import Judge
from trainrt.plugin.tables import Tables
from trainrt.plugin.wire import dumps

OPENED = 8
"""Runs that stay open."""

FILES = digest()
"""Where the page's own files are: another version's are elsewhere, so that a browser may keep them."""
KEPT_S = 30 * 24 * 3600

_log = logging.getLogger(__name__)


class Opened:
    """A run that somebody looks at."""

    def __init__(self, name: str, source: Source):
        self.name, self.source = name, source
        self.tables = Tables(source.open(name))
        self.judge = Judge()


class TrainrtPlugin(base_plugin.TBPlugin):
    """Serves the page and the answers it asks for."""

    plugin_name = "trainrt"

    def __init__(self, context: base_plugin.TBContext):
        self._flags = getattr(context, "flags", None)
        self._logdir = context.logdir
        self._provider = context.data_provider
        self._sources: dict[str, Source] = {}
        self._opened: OrderedDict[tuple[str, str], Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._warmed = ""

    def get_plugin_apps(self) -> dict[str, Callable]:
        apps = {f"/{FILES}/{name}": self._static(name, data) for name, data in static_files().items()}
        apps |= {f"/api/{name}": self._answer(function) for name, function in answers.ROUTES.items()}
        return apps

    def is_active(self) -> bool:
        """Whether any run has a record. Asked by a browser that begins to load TensorBoard."""
        try:
            return self.warm()
        except Exception:
            return False

    def warm(self) -> bool:
        """Whether there are runs. The newest, which the page will most likely show, is opened by a thread meanwhile."""
        names = self.source("").names()
        if names and names[0] != self._warmed:
            self._warmed = names[0]
            threading.Thread(target=self._warm, args=(names[0],), daemon=True).start()
        return bool(names)

    def _warm(self, name: str) -> None:
        with contextlib.suppress(Exception), np.errstate(all="ignore"):
            answers.read_ahead(self.opened("", name).tables)

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(
            es_module_path=f"/{FILES}/index.js", tab_name="Training", disable_reload=True
        )

    def source(self, experiment: str) -> Source:
        """Where the runs of an experiment are."""
        spec = getattr(self._flags, "logdir_spec", "")
        if local(self._logdir, spec):
            experiment = ""
        if experiment not in self._sources:
            at_hand = local(self._logdir, spec)
            self._sources[experiment] = Files(self._logdir) if at_hand else Loaded(self._provider, experiment)
        return self._sources[experiment]

    def opened(self, experiment: str, name: str) -> Opened:
        """A run, opened or brought up to date.

        Raises:
          Refused: There is no such run, or it cannot be read.
        """
        with self._lock:
            return self._open(self.source(experiment), (experiment, name))

    def _open(self, source: Source, key: tuple[str, str]) -> Opened:
        name = key[1]
        if name not in source.names():
            self._opened.pop(key, None)
            raise Refused(404, f"There is no run {name!r} here any more.")
        try:
            found = self._opened.get(key)
            if found is None or source.stale(name, found.tables.run):
                found = self._opened[key] = Opened(name, source)
            else:
                found.tables.refresh()
        except (OSError, ValueError, KeyError) as error:
            raise Refused(409, f"The record of {name!r} cannot be read: {error}") from error
        self._opened[key] = found
        self._opened.move_to_end(key)
        while len(self._opened) > OPENED:
            self._opened.popitem(last=False)
        return found

    def _static(self, name: str, data: bytes) -> Callable:
        packed = gzip.compress(data, 9, mtime=0)  # once; TensorBoard would do it for each request

        @wrappers.Request.application
        def app(request):
            kind = MIME[name[name.rindex(".") :]]
            return http_util.Respond(request, packed, kind, expires=KEPT_S, content_encoding="gzip")

        return app

    def _answer(self, function: Callable) -> Callable:
        @wrappers.Request.application
        def app(request):
            if request.method != "GET":
                return _refuse(request, Refused(405, "This page only reads. Ask with GET."))
            try:
                with np.errstate(all="ignore"):
                    answer = function(self, request.environ.get(experiment_id.WSGI_ENVIRON_KEY, ""), request.args)
            except Refused as refused:
                return _refuse(request, refused)
            except Exception as error:
                _log.exception("trainrt could not answer %s", request.path)
                return _refuse(request, Refused(409, f"This could not be read: {type(error).__name__}: {error}"))
            if isinstance(answer, bytes):
                return http_util.Respond(request, answer, "application/octet-stream")
            return http_util.Respond(request, dumps(answer), "application/json")

        return app


def _refuse(request, refused: Refused):
    return http_util.Respond(request, dumps({"error": str(refused)}), "application/json", code=refused.code)
