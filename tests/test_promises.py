"""docs/promises.md names the test behind each line, and that test is there."""

import ast
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_every_test_that_the_page_names_is_there():
    named = NAMED.findall(PAGE)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{file}::{name}"


def test_every_promise_names_a_test():
    everywhere = PAGE.partition("## Everywhere")[2].partition("\n## ")[0]
    rows = [line for line in everywhere.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        assert NAMED.search(row), row
