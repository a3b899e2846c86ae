"""The pages in docs/ say what the docstrings say today."""

import importlib.util
import re
from pathlib import Path

import pytest

from trainrt import findings
from trainrt.experiment import changes
from trainrt.record import statistics

DOCS = Path(__file__).parent.parent / "docs"
_spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_page_is_current(name):
    assert (DOCS / name).read_text() == generate.PAGES[name](), "run: python docs/generate.py"


def test_every_rule_statistic_cause_and_change_has_its_place():
    pages = {name: make() for name, make in generate.PAGES.items()}
    assert all(f"## {rule.__name__}\n" in pages["rules.md"] for rule in findings.ALL)
    own = [n for n, s in statistics.STATISTICS.items() if s.function.__module__.startswith("trainrt")]
    assert all(f"| `{name}` |" in pages["statistics.md"] for name in (*own, *statistics.QUANTITIES))
    assert all(f"| `{cause}` |" in pages["causes.md"] for cause in findings.CAUSES)
    assert re.findall(r"^\| ([^|`-]+?) \|", pages["changes.md"], re.M)[1:] == [c.name for c in changes.CHANGES]


@pytest.mark.parametrize("cause", sorted(findings.CAUSES))
def test_a_cause_may_be_named_by_some_rules_and_not_by_all(cause):
    assert 0 < len(findings.naming(cause, findings.ALL)) < len(findings.ALL) / 4


def test_code_in_a_page_is_closed():
    for name in generate.PAGES:
        assert (DOCS / name).read_text().count("```") % 2 == 0


def test_links_of_the_readme_lead_somewhere():
    readme = (DOCS.parent / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (DOCS.parent / target).exists(), target
    headings = re.findall(r"^#+ (.+)$", readme, re.M)
    places = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", readme)) <= places
