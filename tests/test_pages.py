"""The README and docs, read by a user: every command and Python block that can run offline runs, in
small, in a folder of the user's own, twice; and every option that is named exists."""

import re
import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

import cli
import imagenet_names
import training

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]

# what can't run here as it stands, by how it begins, and who runs it
ELSEWHERE = {
    "dimr audit": "tests/test_audit.py",
    "python -m venv": "tests/test_install.py",
    "pip install": "tests/test_install.py",
    "pytest": "tests/conftest.py",
    "ruff": "tests/test_architecture.py",
    "apt-get": "tools/fashion_mnist.py",
    "python tools/fashion_mnist.py": "tools/fashion_mnist.py",
    "python tools/bench.py": "tests/test_bench.py",
    "dimr demo": "tests/test_demo.py",
    ". .venv/bin/activate": "tests/test_install.py",
    # full-size VAE and Inception
    "dimr encode --res 256": "tests/test_chain.py",
    "torchrun": "tests/test_chain.py",
    "dimr sample --class animals": "tests/test_chain.py",
    "dimr eval fid --inception": "tests/test_chain.py",
    "dimr train --variant xl2r": "tests/test_chain.py",
    "dimr eval fid": "tests/test_chain.py",
    # fair sets of 50,000
    "dimr eval all": "tests/test_eval.py",
    "dimr sample --labels": "tests/test_sampling.py",
    "dimr eval verify": "tests/test_verification.py",
    "dimr sweep": "tests/test_sweep.py",
    "python tools/intervals.py": "tests/test_errors.py",
    # released weights
    "dimr sample --weights dit-xl2-256": "tests/test_reproduce.py",
    "dimr sample --weights SiT": "tests/test_reproduce.py",
    # snapshots of a whole run
    "dimr ema": "tests/test_averages.py",
    "dimr sample --weights runs/xl2r --ema-width": "tests/test_averages.py",
    "dimr sample --weights runs/xl2r --guide": "tests/test_autoguidance.py",
    # latents that another project made
    "dimr encode --from-latents": "tests/test_containers.py",
    # 60,000 images that a package brings
    "dimr train --data data/fashion": "tools/fashion_mnist.py",
    "dimr sample --weights runs/fashion": "tools/fashion_mnist.py",
    "dimr sample --weights fashion --balanced": "tests/test_shipped.py",
    "python tools/ladder.py": "tests/test_ladder.py",
    "dimr analyse pca --weights runs/ladder": "tests/test_analysis.py",
    "dimr analyse time --weights runs/ladder": "tests/test_analysis.py",
    # a cluster
    "#SBATCH": "tests/test_parallel.py",
    "srun": "tests/test_parallel.py",
    "export": "tests/test_parallel.py",
    "grep": "tests/test_parallel.py",
    "scontrol": "tests/test_parallel.py",
}
# Python of packages that dimr does without
FOREIGN = ("webdataset.",)
# pages whose commands have a test of their own
OWN_TEST = {"docs/reproduce.md": "tests/test_reproduce.py"}
RUN_ANYWAY = ("dimr eval fid --weights demo/run",)

# what makes each small; the last of two equal options counts
SMALL = {
    "train": "--steps 2 --batch-size 2 --workers 0 --sample-every 0 --device cpu",
    "sample": "-n 2 --steps 1 --batch-size 2 --device cpu",
    "eval": "-n 4 --steps 1 --device cpu",
    "encode": "--workers 0 --device cpu",
}
SMALLER = {
    "--variant table2-2": "--layers 1 --dims 8 --heads 1",
    "--variant m3r": "--micro-batch 1 --layers 1,1,1 --dims 8,8,8 --heads 1",
    "--class 388": "--weights runs/xl2r",
}


def blocks(page, language):
    """The fenced blocks of a page in a language ("" for those that name none)."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(page):
    """The commands of a page's blocks, comments left out."""
    found = []
    texts = blocks(page, "bash")
    if page == "docs/distributed.md":
        texts += blocks(page, "")
    for block in texts:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#(?!SBATCH).*", "", line)
            parts = re.split(r"&&|\|\|", line)
            found += [" ".join(part.split()) for part in parts if part.strip()]
    return found


def elsewhere(command):
    """The file that answers for a command which does not run here, or None."""
    plain = re.sub(r"^\w+=\S+ ", "", command)
    if plain.startswith(RUN_ANYWAY):
        return None
    for start, file in ELSEWHERE.items():
        if plain.startswith(start):
            return file
    return None


def in_small(command):
    """The words after `dimr` of a command that takes seconds."""
    plain = re.sub(r"^\w+=\S+ ", "", command)
    program, *words = shlex.split(plain)
    assert program == "dimr", f"say in ELSEWHERE who runs {command!r}"
    words += shlex.split(SMALL.get(words[0], ""))
    for part, more in SMALLER.items():
        if part in plain:
            words += shlex.split(more)
    return words


def invoke(words):
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"


# the user's folder


def images_of(folder, classes, side):
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(2):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.jpg")


def train(out, data):
    training.train(
        out,
        training.Source(data, workers=0),
        recipe={"steps": 1, "batch_size": 2},
        network={"layers": (1,), "dims": (8,), "heads": 1},
        device="cpu",
        saving=training.Saving(sample_every=0),
        quiet=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """What the pages speak of: photographs of the user's, a run on ImageNet, the demo's run."""
    place = tmp_path_factory.mktemp("user")
    images_of(place / "photos", ("cats", "dogs"), 80)
    images_of(place / "other-photos", ("dogs", "horses"), 64)
    identifiers = [identifier for identifier, _ in imagenet_names.CLASSES]
    images_of(place / "tiny", identifiers, 8)
    train(place / "runs" / "xl2r", place / "tiny")
    train(place / "demo" / "run", digits)
    shutil.rmtree(place / "tiny")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("time", ["first", "second"])
def test_what_the_pages_say_runs(folder, monkeypatch, time):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    monkeypatch.delenv("DIMR_DATA", raising=False)
    ran = 0
    for page in PAGES:
        if page in OWN_TEST:
            continue
        for command in commands(page):
            if not elsewhere(command):
                invoke(in_small(command))
                ran += 1
        for block in blocks(page, "python"):
            if any(name in block for name in FOREIGN):
                continue
            exec(compile(block, page, "exec"), {})
            ran += 1
    assert ran >= 10
    assert (folder / "two.png").exists() and (folder / "pandas.png").exists()


# what need not run


@pytest.mark.parametrize("file", sorted({*ELSEWHERE.values(), *OWN_TEST.values()}))
def test_those_who_answer_for_the_others_exist(file):
    assert (ROOT / file).is_file()


def spans(page):
    """The `dimr …` and `torchrun … -m cli …` of a page, in blocks and in running text."""
    text = (ROOT / page).read_text()
    inline = re.findall(r"`((?:dimr|torchrun) [^`]+)`", re.sub(r"(?sm)^```.*?^```", "", text))
    return [" ".join(span.split()) for span in inline] + commands(page)


def command_of(words):
    """The click command that `words` begin with, or None."""
    command = cli.main
    for word in words:
        if word.startswith("-") or not hasattr(command, "commands"):
            break
        if word not in command.commands:
            return None
        command = command.commands[word]
    return command


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_exists(page):
    for span in spans(page):
        named = re.match(r"(?:\w+=\S+ )?(?:srun )?(?:dimr|torchrun .*?-m cli) (.*)", span)
        if named is None:
            continue
        words = named[1].split()
        command = command_of(words)
        assert command is not None, f"{page}: {span}"
        known = {"--help", "--help-all", "--version", "-h"}
        for option in command.params:
            known.update(option.opts, option.secondary_opts)
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in known, f"{page}: {word} in {span}"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert page in text or page == "README.md"
        for target in re.findall(r"\]\(([^):#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
