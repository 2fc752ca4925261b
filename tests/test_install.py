"""What the README says to type works in a user's folder, whatever lies there: in processes with a
clean environment, for an editable and a plain installation, each line twice."""

import ours

import os
import shutil
import subprocess
import sys
import venv

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "data", "runs", "samples", "demo"
)
SMALL = "--layers 2,1 --dims 16,8 --heads 2 --batch-size 8 --steps 2 --sample-every 0 --device cpu"
DRAW = "sample -n 1 --steps 1 --device cpu"
# what a user's module does that takes the place of ours
STRANGER = "raise SystemExit(__file__ + ' took the place of a module of dimr')"
PANDA = "import ours, imagenet_names; print(imagenet_names.find('giant panda'), ours.shipped('{}'))"
PANDA = PANDA.format("imagenet_classes.tsv")


class Installation:
    """A fresh environment in `folder` that sees this one's packages, with dimr in it."""

    def __init__(self, folder, checkout, *options):
        self.checkout = checkout
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        venv.create(folder / "environment", with_pip=False)
        self.scripts = folder / "environment" / "bin"
        [site] = (folder / "environment").glob("lib/*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (site / "others.pth").write_text("\n".join(others))
        pip = [sys.executable, "-m", "pip", "--python", self.scripts / "python"]
        pip += ["--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
        pip += ["--no-build-isolation", *options, checkout]
        subprocess.run(pip, check=True, env=self.environment(), cwd=folder)

    def environment(self):
        """What a user's shell has, and nothing of ours."""
        return {
            "PATH": os.pathsep.join([str(self.scripts), os.defpath]),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "DIMR_OFFLINE": "1",
        }

    def run(self, *command, cwd):
        done = subprocess.run(
            command, cwd=cwd, env=self.environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def line(self, line, cwd):
        return self.run(*line.split(), cwd=cwd)


def copy_checkout(target):
    shutil.copytree(ROOT, target, ignore=NOT_COPIED)
    return target


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """`pip install -e` of a clone called dimr."""
    folder = tmp_path_factory.mktemp("editable")
    return Installation(folder, copy_checkout(folder / "clones" / "dimr"), "-e")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    installation = Installation(folder, copy_checkout(folder / "source"))
    shutil.rmtree(installation.checkout)
    return installation


@pytest.fixture(params=["editable", pytest.param("plain", marks=pytest.mark.long)])
def installation(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def place(tmp_path, digits):
    """A user's folder: photographs, folders of all the names that we use, and a module of the
    user's for each of ours (but for `sampling`, which the user imports, and `cli` and `ours`)."""
    shutil.copytree(digits, tmp_path / "photos")
    for name in ("dimr", "runs", "samples", "data", "demo", "storage"):
        (tmp_path / name).mkdir()
    for name in ours.MODULES:
        if name != "sampling":
            (tmp_path / f"{name}.py").write_text(STRANGER.format(name=name))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "__init__.py").write_text(STRANGER.format(name="dataset"))
    return tmp_path


def test_the_readmes_lines_work_twice_in_a_users_folder(installation, place):
    encode = "dimr encode --res 8 --pixels --data photos --workers 0"
    torchrun = "python -m torch.distributed.run --nproc-per-node 1 -m cli"
    train = f"{torchrun} train --variant demo {SMALL} --workers 0"
    python = "import sampling; print(sampling.load(device='cpu').images([1], [0]).shape)"
    for _ in range(2):
        assert "-> data/pixels-8" in installation.line(encode, place)
        assert "runs/demo: step 2 of 2" in installation.line(train, place)
        assert "from runs/demo" in installation.line(f"python -m cli {DRAW}", place)
        assert "from runs/demo" in installation.line(f"dimr {DRAW}", place)
        assert installation.run("python", "-c", python, cwd=place) == "(1, 8, 8, 1)\n"


# a module as `cli` is, whose reading processes are started anew instead of forked
SPAWNED = """
import multiprocessing
import cli
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    cli.main(prog_name="dimr")
"""


def test_reading_processes_find_our_modules_too(editable, place):
    (place / "spawned.py").write_text(SPAWNED)
    train = f"train --variant demo {SMALL} --data photos --workers 1"
    for module in ("cli", "spawned"):
        done = editable.line(f"python -m {module} {train} --out {module}", place)
        assert f"{module}: step 2 of 2" in done


FEATURES = """
def pooled(images):
    return images.float().mean((1, 2))
"""


def test_features_come_from_a_users_module_though_ours_has_its_name(editable, place):
    (place / "vit.py").write_text(FEATURES)
    evaluate = "eval fid photos --ref photos --features vit:pooled --device cpu"
    assert "features of vit:pooled" in editable.line(f"python -m cli {evaluate}", place)
    assert "features of vit:pooled" in editable.line(f"dimr {evaluate}", place)


def test_the_command_works_beside_a_users_cli(installation, place):
    (place / "cli.py").write_text(STRANGER)
    (place / "ours.py").write_text(STRANGER)
    assert "demo: " in installation.line("dimr info --variant demo", place)


def test_a_clone_works_from_its_parent_and_from_within(editable):
    for cwd in (editable.checkout.parent, editable.checkout):
        assert "demo: " in editable.line("python -m cli info --variant demo", cwd)
        found = editable.run("python", "-c", "import dimr; print(dimr.__file__)", cwd=cwd)
        assert found == f"{editable.checkout / 'dimr.py'}\n"


def test_files_that_ship_are_found(installation, place):
    index, path = installation.run("python", "-c", PANDA, cwd=place).split()
    assert index == "388"
    if installation.checkout.exists():
        assert path == str(installation.checkout / "share" / "dimr" / "imagenet_classes.tsv")
    else:
        prefix = installation.scripts.parent
        assert path == str(prefix / "share" / "dimr" / "imagenet_classes.tsv")


@pytest.mark.parametrize("option", ["--target", "--prefix"])
def test_files_that_ship_are_found_wherever_pip_puts_them(option, tmp_path):
    there = tmp_path / "there"
    source = copy_checkout(tmp_path / "source")
    installation = Installation(tmp_path, source, option, there)
    shutil.rmtree(source)
    [module] = there.rglob("ours.py")
    code = f"import sys; sys.path.append({str(module.parent)!r}); {PANDA}"
    found = installation.run("python", "-c", code, cwd=tmp_path)
    assert found.split() == ["388", str(there / "share" / "dimr" / "imagenet_classes.tsv")]
