"""Our names mean our modules, a user's the user's; files that ship; tables read from the source."""

import ours

import importlib
import sys

import pytest
from conftest import ROOT

import dimr
import vit


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A user's folder to work in, first on the path as `python -m` puts it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def forgotten(monkeypatch):
    """`vit` not yet imported, as far as Python knows; afterwards all is as it was."""
    monkeypatch.delitem(sys.modules, "vit")


def test_our_names_mean_our_modules_beside_a_users_of_the_same_name(place, forgotten):
    (place / "vit.py").write_text("raise AssertionError('the user’s own')")
    (place / "theirs.py").write_text("")
    assert importlib.import_module("vit").__file__ == str(ROOT / "vit.py")
    assert importlib.import_module("theirs").__file__ == str(place / "theirs.py")


def test_a_stranger_under_one_of_our_names_is_refused(place, monkeypatch):
    (place / "vit.py").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not ours.FINDER])
        patch.delitem(sys.modules, "vit")
        importlib.import_module("vit")
        message = f"module vit that is loaded .{place}/vit.py. is not dimr's.*rename the other one"
        with pytest.raises(ImportError, match=message) as refusal:
            ours.refuse_strangers()
    assert "\n" not in str(refusal.value)
    ours.refuse_strangers()


def test_a_folder_under_one_of_our_names_is_refused_too(place, monkeypatch):
    (place / "vit").mkdir()
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not ours.FINDER])
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.delitem(sys.modules, "vit")
    importlib.import_module("vit")
    with pytest.raises(ImportError, match="module vit that is loaded .a folder. is not dimr's"):
        ours.refuse_strangers()


def test_a_users_module_is_the_users_though_one_of_ours_has_its_name(place):
    (place / "vit.py").write_text("import solver, dimr, their_part\nname = 'the user’s vit'")
    (place / "solver.py").write_text("name = 'the user’s solver'")
    (place / "their_part.py").write_text("name = 'theirs'")
    found = ours.users_module("vit")
    assert found.name == "the user’s vit"
    assert found.solver.name == "the user’s solver"
    assert found.their_part.name == "theirs"
    assert found.dimr is dimr  # the user has none
    assert sys.modules["vit"] is vit
    assert importlib.import_module("solver").__file__ == str(ROOT / "solver.py")


def test_a_users_package_of_one_of_our_names_is_the_users(place):
    (place / "fid").mkdir()
    (place / "fid" / "__init__.py").write_text("")
    (place / "fid" / "features.py").write_text("name = 'the user’s'")
    assert ours.users_module("fid.features").name == "the user’s"
    assert importlib.import_module("fid").__file__ == str(ROOT / "fid.py")


def test_our_module_is_meant_where_the_user_has_none_of_that_name(place):
    (place / "vit").mkdir()  # a folder is no module
    assert ours.users_module("vit") is vit


def test_our_modules_come_back_after_a_users_that_fails(place):
    (place / "vit.py").write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        ours.users_module("vit")
    assert importlib.import_module("vit") is vit
    with pytest.raises(ImportError, match="nowhere"):
        ours.users_module("nowhere")


def test_the_working_directory_is_put_on_the_path_for_a_users_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_features.py").write_text("import their_helper")
    (tmp_path / "their_helper.py").write_text("")
    assert ours.users_module("their_features").their_helper.__file__.startswith(str(tmp_path))


def test_a_file_that_is_not_shipped_is_named():
    with pytest.raises(FileNotFoundError, match="nothing.bin, a file that belongs to dimr"):
        ours.shipped("nothing.bin")


@pytest.mark.parametrize(
    "module, table",
    [
        ("dimr", "VARIANTS"),
        ("dimr", "NORMS"),
        ("dimr", "MLPS"),
        ("peers", "VARIANTS"),
        ("diffusion", "OBJECTIVES"),
        ("diffusion", "LOSSES"),
        ("diffusion", "TARGET_SCALES"),
        ("solver", "SOLVERS"),
        ("solver", "GRIDS"),
        ("space", "PRESETS"),
        ("evaluation", "METRICS"),
    ],
)
def test_keys_are_those_of_the_real_table(module, table):
    rows = getattr(importlib.import_module(module), table)
    assert list(ours.keys(module, table)) == list(rows)


def test_a_missing_table_and_a_computed_one_are_refused():
    with pytest.raises(LookupError, match="dimr.py has no table NOTHING"):
        ours.keys("dimr", "NOTHING")
    with pytest.raises(LookupError, match="storage.py has no table VERSION"):
        ours.keys("storage", "VERSION")
