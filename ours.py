"""Where our own modules and files are, whatever lies in the folder that one works in.

`python -m cli`, `torchrun -m cli` and `python -c` look for modules in the working directory first,
so that a user's `dataset.py`, or a folder `dataset/`, would take the place of ours. Importing this
module, which everything that a user starts or imports does before all else, puts an end to that:
from then on our names mean the files beside this one, and all other names mean what they meant
before. What is found before this module can't be helped: a user's own `cli.py` or `ours.py`."""

import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# imports point down this list: what stands alone imports nothing of ours and may be copied out
ALONE = (
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
)
PARTS = (
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
)
# each may import those before it
JOBS = (
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
)
MODULES = (*ALONE, *PARTS, *JOBS)  # all that others of ours import: not cli, not this one


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of MODULES beside this file, but for those that stand `aside`."""

    def __init__(self):
        self.aside = frozenset()

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES or name in self.aside:
            return None
        return importlib.util.spec_from_file_location(name, HERE / f"{name}.py")


def is_ours(file):
    """Whether a module's file lies beside this one; None, a module without a file, does not."""
    return file is not None and Path(file).resolve().parent == HERE


def refuse_strangers():
    """Raise ImportError if a module of another's is loaded under one of our names."""
    for name in MODULES:
        if name not in sys.modules:
            continue
        file = getattr(sys.modules[name], "__file__", None)
        if not is_ours(file):
            raise ImportError(
                f"the module {name} that is loaded ({file or 'a folder'}) is not dimr's; dimr "
                f"needs {HERE / name}.py under that name: rename the other one"
            )


def users_module(name):
    """Import the user's module `name` ("vit", "package.module") as if none of ours were called
    like what lies in the working directory; what it imports in turn is the user's as well. Our
    modules stay what they are for us. Where the user has no module of a name of ours, ours is
    meant.

    Raises what the import raises: ImportError where there is no such module."""
    place = os.getcwd()
    if place not in sys.path:
        sys.path.insert(0, place)  # the script `dimr` leaves it out
    theirs = [module for module in MODULES if _lies_in(place, module)]
    kept = {module: sys.modules.pop(module) for module in theirs if module in sys.modules}
    FINDER.aside = frozenset(theirs)
    try:
        return importlib.import_module(name)
    finally:
        FINDER.aside = frozenset()
        for module in theirs:
            sys.modules.pop(module, None)
        sys.modules.update(kept)


def _lies_in(place, name):
    """Whether folder `place` holds a module or package `name` that is not ours. A folder without
    `__init__.py` is none, as anywhere in Python where a module has its name."""
    spec = importlib.machinery.PathFinder.find_spec(name, [place])
    return spec is not None and spec.has_location and not is_ours(spec.origin)


def shipped(name: str) -> Path:
    """The file `name` that comes with the tool: under share/dimr beside the modules (a checkout,
    an editable installation), or under the share/dimr that pip noted for an installation.

    Raises FileNotFoundError."""
    beside = HERE / "share" / "dimr" / name
    if beside.exists():
        return beside
    import importlib.metadata  # here, since it takes longer than the rest

    for installation in importlib.metadata.distributions(name="dimr", path=[str(HERE)]):
        for file in installation.files or ():
            path = Path(installation.locate_file(file))
            if file.as_posix().endswith(f"/share/dimr/{name}") and path.exists():
                return path.resolve()
    raise FileNotFoundError(
        f"{name}, a file that belongs to dimr, is neither {beside} nor in its installation; "
        "install dimr again"
    )


def keys(module: str, table: str) -> list[str]:
    """The keys of a dict at the top level of one of our modules, as a tuple, read from the source:
    the command line names them without importing PyTorch.

    Raises LookupError where there is no such table, ValueError for a key that is no literal."""
    found = []
    for statement in _statements(module):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=rows)):
                if name == table:
                    found += [ast.literal_eval(row) for row in rows]
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=row)]):
                if name == table:
                    found.append(ast.literal_eval(row))
    if not found:
        raise LookupError(f"{HERE / module}.py has no table {table}")
    return tuple(found)


def words(module, table):
    """Key → first words of each row of such a dict whose rows are calls that begin with a text."""
    texts = {}
    for statement in _statements(module):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=rows, values=calls)):
                if name == table:
                    for row, call in zip(rows, calls, strict=True):
                        texts[ast.literal_eval(row)] = ast.literal_eval(call.args[0])
    return texts


@functools.cache
def _statements(module):
    return ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8")).body


refuse_strangers()
FINDER = Finder()
sys.meta_path.insert(0, FINDER)
