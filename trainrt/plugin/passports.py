"""Two passports line by line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_DIGESTS = ("determinism.fingerprint", "determinism.model_config")  # of what has lines of its own
_ALWAYS = ("start", "began", "pid", "command", "fit.logdir", "optimizer.name", "optimizer.config.name", *_DIGESTS)
_NUMBERED = re.compile(r"^(updates\.\w+?)_\d+$")
_WORD = re.compile(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])")


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The lines in which two passports differ, as (where, left, right); what differs between any two runs is left out.

    >>> differences({"start": 1, "fit": {"clip": 1.0}}, {"start": 2, "fit": {"clip": None}})
    [('fit.clip', '1.0', 'None')]
    >>> differences({"layers": [{"name": "hidden", "units": 8}]}, {"layers": [{"name": "hidden", "units": 16}]})
    [('layers.hidden.units', '8', '16')]
    >>> differences({"updates": {"sgd": "fused"}}, {"updates": {"sgd_1": "fused"}})
    []

    Names that Keras gave count through a process, so that the same model may have others:

    >>> first, second = ({"layers": [{"name": name, "class": "Dense"}]} for name in ("dense", "dense_7"))
    >>> differences(first, second)
    []
    """
    mine, yours = dict(_flat(left)), dict(_flat(right))
    names = [name for name in (*mine, *(n for n in yours if n not in mine)) if name not in _ALWAYS]
    pairs = [(name, mine.get(name, "-"), yours.get(name, "-")) for name in names]
    return [(name, *_short(a, b)) for name, a, b in pairs if str(a) != str(b)]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            inside = f"{name}.{key}" if name else str(key)
            yield from _flat(item, _NUMBERED.sub(r"\1", inside))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        seen: Counter[str] = Counter()
        for i, item in enumerate(value):
            own = str(item.get("name", i)) if isinstance(item, Mapping) else str(i)
            if isinstance(item, Mapping) and _given(own, item.get("class")):
                kind = _WORD.sub("_", str(item["class"])).lower()
                own = f"{kind}_{seen[kind]}" if seen[kind] else kind
                seen[kind] += 1
                item = {key: inner for key, inner in item.items() if key != "name"}
            yield from _flat(item, f"{name}.{own}")
    else:
        yield name, value


def _given(name: str, kind: Any) -> bool:
    """Whether Keras made up the name: that of the class, and a number if it was not the first in the process.

    >>> _given("conv2d_1", "Conv2D"), _given("max_pooling2d", "MaxPooling2D"), _given("hidden", "Dense")
    (True, True, False)
    """
    return (
        isinstance(kind, str) and re.fullmatch(re.escape(_WORD.sub("_", kind).lower()) + r"(_\d+)?", name) is not None
    )


def _short(left: Any, right: Any) -> tuple[str, str]:
    """As people read them: float32 as a Python number has digits that nobody chose, and only where they tell.

    >>> _short(0.003000000026077032, 0.05), _short(0.5, 0.5000000001)
    (('0.003', '0.05'), ('0.5', '0.5000000001'))
    """
    a, b = (f"{v:.7g}" if isinstance(v, float) and len(str(v)) > 9 else str(v) for v in (left, right))
    return (a, b) if a != b else (str(left), str(right))
