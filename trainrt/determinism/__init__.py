"""Determinism: switched on, checked ahead, proven, located where it breaks, and priced.

    trainrt.determinism.enable(seed=1)                      # before the model is built
    trainrt.fit(model, x, y, deterministic=True, seed=1)    # the same bits each time

| module | what it does |
|---|---|
| `modes` | switches determinism on, refuses when that comes too late, says what the bits depend on |
| `hazards` | which ops raise, go through the host or stay non-deterministic |
| `preflight` | walks the graph of a step and finds them, with the layer that made each |
| `digests` | exact digests of what a step reads and writes |
| `prove` | runs a script several times in fresh processes and compares the bits |
| `bench` | what determinism costs, beside the fast mode, a fresh process each |
| `zoo` | the models of `prove`'s tests and of `bench` |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainrt.determinism.digests import Digests
    from trainrt.determinism.modes import enable, is_enabled

_HOME = {"Digests": "digests", "enable": "modes", "is_enabled": "modes"}

__all__ = ["Digests", "enable", "is_enabled"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'trainrt.determinism' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"trainrt.determinism.{_HOME[name]}"), name)
