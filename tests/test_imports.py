"""What the import system must hold: every registry row imports, imports point one way, every error pickles."""

from __future__ import annotations

import pickle
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import al_models
import storage
import tasks
from al_models.detector import Detector
from al_models.errors import unknown
from al_models.registry import METHODS, detector_class
from storage.datasets import DATASETS

ROOT = Path(__file__).parent.parent
ROOMS = ("flows", "tasks", "al_models", "storage")


# registries


@pytest.mark.parametrize("name", METHODS)
def test_every_method_imports_from_its_family(name: str) -> None:
    cls = detector_class(name)
    assert issubclass(cls, Detector)
    assert cls.__module__.startswith(f"al_models.{METHODS[name].family}.")


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_a_layout(name: str) -> None:
    assert callable(import_module(DATASETS[name]).list_samples)


@pytest.mark.parametrize("table", [METHODS, DATASETS], ids=["methods", "data sets"])
def test_the_tables_are_sorted(table: dict[str, object]) -> None:
    assert list(table) == sorted(table)


# one way


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter", reason="comes with the extra `dev`; CI has it")
    code = "from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )


def test_imports_point_one_way() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 4 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("storage/bad.py", "import torch"),
        ("storage/bad.py", "from al_models.types import Prediction"),
        ("al_models/bad.py", "from storage.store import Store"),
        ("al_models/bad.py", "import zarr"),
        ("tasks/bad.py", "from distributed import Client"),
        ("tasks/bad.py", "import flows"),
    ],
)
def test_an_import_the_wrong_way_is_noticed(file: str, statement: str, tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    for used in ("storage/store.py", "al_models/types.py"):
        (tmp_path / used).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).write_text(f"{statement}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert file.removesuffix(".py").replace("/", ".") in result.stdout


# errors


def our_modules() -> Iterator[ModuleType]:
    for room in (al_models, storage, tasks):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            yield import_module(found.name)


def our_errors() -> list[type[Exception]]:
    """Every exception class that the rooms below `flows` define."""
    found = {
        value
        for module in our_modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__
    }
    return sorted(found, key=lambda cls: (cls.__module__, cls.__name__))


def test_every_error_crosses_a_process_border_with_its_message() -> None:
    message = "given 'a', expected b; do c"
    found = our_errors()
    for cls in found:
        error = cls(message)
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is cls
        assert str(back) == str(error) == message
        assert back.args == (message,)
    names = {cls.__name__ for cls in found}
    assert {"InvalidInput", "UnknownName", "NotInStore", "StoreTooNew", "Damaged", "CategoryStopped"} <= names


def test_every_error_is_also_one_of_pythons_own() -> None:
    bases = {"ModelsError", "StorageError"}
    ours = ("al_models", "storage", "tasks")
    for cls in our_errors():
        builtin = [base for base in cls.__mro__ if not base.__module__.startswith(ours)]
        assert builtin[0] is not Exception or cls.__name__ in bases, cls


def test_an_unknown_name_pickles_with_the_names_that_are_near() -> None:
    back = pickle.loads(pickle.dumps(unknown("method", "patchcor", ["padim", "patchcore"])))
    assert str(back) == "unknown method 'patchcor'; did you mean patchcore?"
