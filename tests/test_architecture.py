"""Imports point one way: cli → jobs → parts → what stands alone. A new module gets its row in
`ours.py` and in pyproject.toml."""

import ours

import ast
import graphlib
import tomllib

import pytest
from conftest import ROOT

FRONT = ["cli"]
FIRST = ["ours"]  # everyone may import it but what stands alone
TABLE = [*FIRST, *ours.MODULES, *FRONT]


def imports(module):
    """The modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    return found & set(TABLE)


def may_import(module):
    if module in (*ours.ALONE, *FIRST):
        return set()
    if module in ours.PARTS:
        return {*ours.ALONE, *FIRST, *ours.PARTS}
    if module in ours.JOBS:
        return set(TABLE[: TABLE.index(module)])
    return set(TABLE)


@pytest.mark.parametrize("module", TABLE)
def test_imports_point_one_way(module):
    assert imports(module) <= may_import(module)


def test_no_part_imports_itself_by_way_of_others():
    graph = {module: imports(module) for module in TABLE}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(TABLE)


# what a user starts or imports by itself
DOORS = [*FRONT, *ours.JOBS, "dataset", "imagesets", "runfolder"]


@pytest.mark.parametrize("module", DOORS)
def test_doors_import_ours_before_all_else(module):
    body = ast.parse((ROOT / f"{module}.py").read_text()).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import ours"


def test_every_module_is_in_the_table_the_package_and_the_finder():
    present = sorted(path.stem for path in ROOT.glob("*.py"))
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert present == sorted(TABLE)
    assert present == sorted(packaged["tool"]["setuptools"]["py-modules"])
