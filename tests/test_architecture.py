"""Imports point one way: cli → jobs → parts → what stands alone. A new module gets its row here, in
`ours.MODULES` and in pyproject.toml."""

import ours

import ast
import graphlib
import tomllib

import pytest
from conftest import ROOT

# what a user may copy out; imports nothing of ours
ALONE = [
    "dimr",
    "diffusion",
    "solver",
    "vae",
    "fid",
    "errors",
    "vit",
    "peers",
    "averages",
    "schema",
]
# where our modules are; imports nothing of ours either, and everyone may import it but those above
FIRST = ["ours"]
PARTS = [
    "storage",
    "background",
    "parallel",
    "randomness",
    "downloads",
    "archives",
    "containers",
    "shards",
    "dataset",
    "imagesets",
    "runfolder",
    "journal",
    "loggers",
    "pictures",
    "imagenet_names",
    "networks",
    "space",
    "defaults",
]
# each may import those before it
JOBS = [
    "encoding",
    "memory",
    "averaging",
    "inventory",
    "sampling",
    "extraction",
    "evaluation",
    "cards",
    "verification",
    "sweeping",
    "distortion",
    "analysis",
    "validation",
    "recipes",
    "training",
    "widths",
    "audit",
    "forecast",
    "digits_demo",
]
FRONT = ["cli"]
TABLE = [*ALONE, *FIRST, *PARTS, *JOBS, *FRONT]


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
    if module in ALONE + FIRST:
        return set()
    if module in PARTS:
        return {*ALONE, *FIRST, *PARTS}
    if module in JOBS:
        return {*ALONE, *FIRST, *PARTS, *JOBS[: JOBS.index(module)]}
    return set(TABLE)


@pytest.mark.parametrize("module", TABLE)
def test_imports_point_one_way(module):
    assert imports(module) <= may_import(module)


def test_no_part_imports_itself_by_way_of_others():
    graph = {module: imports(module) for module in TABLE}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(TABLE)


# what a user starts or imports by itself
DOORS = [*FRONT, *JOBS, "dataset", "imagesets", "runfolder"]


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
    assert present == sorted(["cli", "ours", *ours.MODULES])
