"""What the import system must hold: every registry row imports, imports point one way, every error pickles."""

from __future__ import annotations

import ast
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Container, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
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
    assert "Contracts: 6 kept, 0 broken." in result.stdout


WRONG = {
    "storage.bad": ("import torch", "torch"),
    "storage.worse": ("from al_models.types import Prediction", "al_models.types"),
    "al_models.bad": ("from storage.store import Store", "storage.store"),
    "al_models.worse": ("import zarr", "zarr"),
    "tasks.core.bad": ("from distributed import Client", "distributed"),
    "tasks.core.worse": ("import flows", "flows"),
    "tasks.core.worst": ("from tasks.fit import fit", "tasks.fit"),
    "tasks.serve.bad": ("from tasks.report import page", "tasks.report.page"),
    "flows.where.bad": ("from flows.cli.terminal import console", "flows.cli.terminal"),
    "flows.runs.bad": ("from flows import benchmark", "flows.benchmark"),
}
"""Module -> what it must not import, and what of it is told."""


def test_every_import_the_wrong_way_is_noticed(tmp_path: Path) -> None:
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, (statement, _) in WRONG.items():
        (tmp_path / f"{module.replace('.', '/')}.py").write_text(f"{statement}\n")
    (tmp_path / "tasks" / "unlisted.py").touch()
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    unseen = {module for module, (_, told) in WRONG.items() if f"{module} -> {told} (l.1)" not in result.stdout}
    assert unseen == set(), result.stdout
    assert "unlisted" in result.stdout


def circle(root: Path, rooms: Sequence[str]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty where there is none. An import
    in a function counts, one for the type checker alone does not."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for room in rooms
        for path in (root / room).rglob("*.py")
    }
    try:
        TopologicalSorter({module: imported_by(path, files) for module, path in files.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imported_by(path: Path, modules: Container[str]) -> set[str]:
    """Which of the modules a file imports; a package that is only passed on the way to one is none of them."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in names}
    return {module for module in found if module in modules}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(ROOT, ROOMS) == []


@pytest.mark.parametrize(
    "statement",
    ["from flows.a import A", "from flows import a", "import flows.a", "def late():\n    from flows.a import A"],
)
def test_a_circle_is_noticed(statement: str, tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "a.py").write_text("from flows.b import B\n")
    (tmp_path / "flows" / "b.py").write_text("if TYPE_CHECKING:\n    import flows.a\n")
    assert circle(tmp_path, ["flows"]) == []
    (tmp_path / "flows" / "b.py").write_text(f"{statement}\n")
    assert set(circle(tmp_path, ["flows"])) == {"flows.a", "flows.b"}


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


def test_no_test_file_imports_another() -> None:
    """What several share lies in a file of its own, so that each can be read, moved and run alone."""
    tests = sorted(Path(__file__).parent.glob("test_*.py"))
    imported = {
        (file.name, name)
        for file in tests
        for name in re.findall(r"^\s*(?:from|import) (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert imported == set()
