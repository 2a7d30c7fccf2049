"""Outputs are named by all code that makes them: what really runs in each step, traced, against what its name reads."""

from __future__ import annotations

import ast
import keyword
import re
import shutil
import sys
import threading
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from al_models.parts.backbone import cached_backbone
from al_models.registry import METHODS
from storage.datasets import DATASETS
from tasks.calibrate import calibrate
from tasks.core import steps
from tasks.core.compute import inputs_of
from tasks.core.handles import Cell
from tasks.core.parts import Part
from tasks.core.policy import Policy
from tasks.core.steps import NOT_IN_NAMES, NotMadeYet, modules_behind, only_looking
from tasks.demo_data import make_demo_data
from tasks.evaluate import evaluate
from tasks.evaluate.count import count_part
from tasks.extract import extract, extract_part
from tasks.fit import fit
from tasks.ingest import ingest
from tasks.predict import predict, predict_part
from tasks.prepare import prepare
from tasks.search.hold_out import hold_out
from tasks.suspect import suspect
from tasks.validate import validate
from tasks.validate.expectations import _great_expectations

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("al_models", "storage", "tasks")
    for path in sorted((ROOT / room).rglob("*.py"))
}
"""Module -> its file."""
MODULES = {str(path): module for module, path in FILES.items()}
CELLS = (
    Cell("demo", "brick", "padim", {"image_size": 64, "channels": 10}, device="cpu", update=True),
    Cell("demo", "brick", "mpad", {"image_size": 64, "epochs": 1}, device="cpu"),
)
PART = Part(0, 4)
STEPS = ("ingest", "prepare", "extract", "validate", "suspect", "search.hold_out", "evaluate")


@dataclass
class Run:
    """The steps of a small data set, each of which has run once."""

    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Step -> gives its output's name again, with the inputs that it had."""
    ran: dict[str, set[str]] = field(default_factory=dict)
    """Step -> the modules of ours of which a function ran."""
    names: dict[str, str] = field(default_factory=dict)
    """Step -> the name of its output, once all have run."""

    def __call__(self, step: str, call: Callable[[], Any]) -> Any:
        """The step's output."""
        with traced() as self.ran[step]:
            made = call()
        self.calls[step] = call
        return made

    def name(self, step: str) -> str:
        """The name that its output has now."""
        steps.code_fingerprint.cache_clear()
        with only_looking():
            try:
                return named(self.calls[step]())
            except NotMadeYet as missing:
                return missing.key


def named(made: Any) -> str:
    """What a step gives back, as the name of its output."""
    if hasattr(made, "categories"):
        (category,) = made.categories
        return str(category.catalogue)
    for attribute in ("suspects", "verdict", "images"):
        if getattr(made, attribute, None) is not None:
            return str(getattr(made, attribute))
    return str(made.keys["evaluation"] if hasattr(made, "fingerprints") else made)


@contextmanager
def traced() -> Iterator[set[str]]:
    """The modules of ours of which a function runs inside, in this thread or in one that starts meanwhile."""
    found: set[str] = set()

    def look(frame: FrameType, event: str, argument: object) -> None:
        module = MODULES.get(frame.f_code.co_filename)
        if module is not None and frame.f_code.co_name != "<module>":
            found.add(module)

    before = sys.gettrace()
    threading.settrace(look)
    sys.settrace(look)
    try:
        yield found
    finally:
        sys.settrace(before)
        threading.settrace(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each step, traced."""
    _, spec = inputs_of(CELLS[0])
    assert spec is not None
    # To trace what these import, too, would take ten seconds.
    _great_expectations()
    cached_backbone(spec, "cpu")
    cached_backbone.cache_clear()
    folder = tmp_path_factory.mktemp("names")
    make_demo_data(folder / "data", train=9, validation=3, good=3, defects_per_type=1, size=64)
    found, store = Run(), str(folder / "store")
    (category,) = found("ingest", lambda: ingest.fn(store, "demo", str(folder / "data"), ["brick"])).categories
    prepared = found("prepare", lambda: prepare.fn(category, 64))
    validated = found("validate", lambda: validate.fn(prepared))
    found("extract part", lambda: extract_part.fn(validated, spec, "cpu", PART))
    features = found("extract", lambda: extract.fn(validated, spec, "cpu"))
    found("suspect", lambda: suspect.fn(validated, features, spec, Policy(rules={"suspected_defect": "reject"}), "cpu"))
    found("hold out", lambda: hold_out.fn(validated, str(folder / "search-data"), 0.5, 0))
    for cell in CELLS:
        judged(found, cell, validated)
    found.names = {step: found.name(step) for step in found.calls}
    return found


def judged(run: Run, cell: Cell, validated: Any) -> None:
    """A cell's own steps."""
    _, spec = inputs_of(cell)
    features = None if spec is None else extract.fn(validated, spec, "cpu")
    name = cell.method
    model = run(f"fit {name}", lambda: fit.fn(cell, validated, features))
    if cell.update:
        run(f"fit {name} at once", lambda: fit.fn(replace(cell, update=False), validated, features))
    calibration = run(f"calibrate {name}", lambda: calibrate.fn(cell, validated, features, model))
    run(f"predict part {name}", lambda: predict_part.fn(cell, validated, features, model, PART))
    maps = run(f"predict {name}", lambda: predict.fn(cell, validated, features, model))
    run(f"count part {name}", lambda: count_part.fn(cell, validated, maps, PART))
    run(f"evaluate {name}", lambda: evaluate.fn(cell, validated, features, model, calibration, maps))


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the rooms that names are made of, each of whose files is read again when it has changed."""
    for room in ("al_models", "storage", "tasks"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    parse = steps._read.__wrapped__
    known: dict[str, tuple[bytes, Any]] = {}

    def read(module: str) -> Any:
        source = (tmp_path / FILES[module].relative_to(ROOT)).read_bytes()
        if module not in known or known[module][0] != source:
            known[module] = source, parse(module)
        return known[module][1]

    monkeypatch.setattr(steps, "_ROOT", tmp_path)
    monkeypatch.setattr(steps, "_read", read)
    yield tmp_path
    steps.code_fingerprint.cache_clear()


def with_another_letter(source: str) -> str:
    """The code with one letter changed: the last of a name near its end, behind the tables of methods and readers."""
    lines, names = source.splitlines(keepends=True), []
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string) and "import" not in token.line:
            names.append(token)
    row, end = names[-2].end
    line = lines[row - 1]
    lines[row - 1] = line[: end - 1] + ("x" if line[end - 1] != "x" else "y") + line[end:]
    ast.parse("".join(lines))
    return "".join(lines)


def test_all_that_runs_in_a_step_is_in_its_name(run: Run, copy: Path) -> None:
    unseen = []
    for step, modules in run.ran.items():
        assert len(modules - NOT_IN_NAMES.keys()) > 5, "nothing was traced"
        assert run.name(step) == run.names[step], "the same code in another place"
    for module in sorted(set().union(*run.ran.values()) - NOT_IN_NAMES.keys()):
        file = copy / FILES[module].relative_to(ROOT)
        source = file.read_text()
        file.write_text(with_another_letter(source))
        unseen += [(step, module) for step in run.ran if module in run.ran[step] and run.name(step) == run.names[step]]
        file.write_text(source)
    assert unseen == []


@pytest.mark.parametrize(
    ("module", "old", "new", "renamed"),
    [
        ("storage.masks", "else 127)", "else 200)", ("prepare", "extract", "fit padim", "evaluate padim")),
        ("tasks.core.stored", "for name in ids]", "for name in ids][::-1]", ("extract", "fit padim", "evaluate padim")),
    ],
)
def test_masks_or_rows_that_are_read_otherwise_leave_no_figure_done(
    module: str, old: str, new: str, renamed: tuple[str, ...], run: Run, copy: Path
) -> None:
    file = copy / FILES[module].relative_to(ROOT)
    source = file.read_text()
    assert source.count(old) == 1
    file.write_text(source.replace(old, new))
    for step in renamed:
        assert run.name(step) != run.names[step], step


def test_comments_docstrings_and_code_without_values_are_in_no_name(run: Run, copy: Path) -> None:
    for module, path in FILES.items():
        file = copy / path.relative_to(ROOT)
        source = file.read_text()
        assert source.startswith('"""')
        source = with_another_letter(source) if module in NOT_IN_NAMES else source
        file.write_text(source.replace('"""', '"""Another', 1) + "\n# another\n")
    assert {step: run.name(step) for step in run.names} == run.names
    assert set(NOT_IN_NAMES) <= set().union(*run.ran.values()), "each is on the list because a step runs it"


def test_a_method_or_a_reader_renames_nothing_but_its_own() -> None:
    methods = {f"al_models.{method.target.partition(':')[0]}" for method in METHODS.values()}
    for own in methods:
        for step in ("tasks.fit", "tasks.calibrate", "tasks.predict"):
            assert modules_behind(step, own) & methods == {own}
    for step in (*STEPS, "evaluate.count"):
        assert not modules_behind(f"tasks.{step}") & {*methods, *DATASETS.values()}, step
    for reader in DATASETS.values():
        others = modules_behind("tasks.ingest", reader) & set(DATASETS.values()) - {reader}
        assert others <= imported_by(reader), reader  # what several share, such as the layout of MVTec AD


def imported_by(module: str) -> set[str]:
    """The modules that it imports itself."""
    nodes = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if node.module}


def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


# What a name does not see is not there to be seen.


def test_a_package_does_nothing_when_it_is_imported() -> None:
    """Its name would have to read each package on the way to a module, and with it all that the package gathers."""
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for module, path in FILES.items():
        if path.name != "__init__.py":
            continue
        for statement in parsed(module).body:
            assert isinstance(statement, plain) or isinstance(getattr(statement, "value", None), ast.Constant), module
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            assert not any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets), module


def test_modules_are_looked_up_by_name_in_the_tables_alone() -> None:
    """A step names what it takes from them; `graph` looks for packages that are not ours."""
    called = re.compile(r"(?<![\w.])(import_module|__import__|find_spec|exec|eval|runpy)\b(?=.*[(])")
    found = {module for module, path in FILES.items() if called.search(path.read_text())}
    assert found == {"al_models.graph", "al_models.registry", "storage.datasets"}


def test_no_step_reads_a_file_of_a_package() -> None:
    """It would not be in its name."""
    others = {path for room in ("al_models", "storage", "tasks") for path in (ROOT / room).rglob("*.*")}
    others = {path for path in others if path.suffix not in (".py", ".pyc", ".md") and path.is_file()}
    assert {path.relative_to(ROOT).parts[:2] for path in others} == {("tasks", "report")}
    steps_of_reports = {module for module in FILES if module.startswith("tasks.report")}
    for step in (*STEPS, "fit", "demo_data"):
        assert not modules_behind(f"tasks.{step}") & steps_of_reports, step
