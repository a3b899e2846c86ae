"""What is wrong with a run: rules over a `Run`, each a document, and the findings they make.

A rule is one function in one file of this package, marked with `@rule`; adding a file adds its rules.
"""

import importlib
import pkgutil

from trainrt.findings.finding import CAUSES, SEVERITIES, TIME_CAUSES, Finding, findings_of_time
from trainrt.findings.rules import Rule, collect, diagnose, explain, fold, naming, rule

ALL: tuple[Rule, ...] = tuple(
    each
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    for each in collect(importlib.import_module(f"{__name__}.{module.name}"))
)
"""Every rule of the package, by the name of its family."""

__all__ = [
    "ALL",
    "CAUSES",
    "SEVERITIES",
    "TIME_CAUSES",
    "Finding",
    "Rule",
    "diagnose",
    "explain",
    "findings_of_time",
    "fold",
    "naming",
    "rule",
]
