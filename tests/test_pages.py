"""The pages for people: each room has one, links and commands exist, and what the first page shows works."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import typer.main

from al_models.checks import check_detector
from flows.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in ROOT.rglob("README.md") if not {".venv", "node_modules", "build"} & set(path.parts))
ROOMS = ("flows", "flows/where", "tasks", "tasks/night", "tasks/search", "tasks/serve", "al_models", "storage", "tests")


@pytest.mark.parametrize("room", [*ROOMS, "infra"])
def test_each_room_has_a_page(room: str) -> None:
    assert (ROOT / room / "README.md").is_file()


def test_links_lead_to_files_and_commands_exist() -> None:
    gone, commands = [], set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for page in PAGES:
        text = page.read_text()
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        gone += [f"{page}: {link}" for link in links if "://" not in link and not (page.parent / link).exists()]
        gone += [
            f"{page}: al {name}" for name in re.findall(r"^al ([a-z]+)", text, re.MULTILINE) if name not in commands
        ]
    assert gone == []


def test_the_first_page_adds_a_method_that_keeps_the_contract(tmp_path: Path) -> None:
    """The code between the fences, word for word."""
    code = re.search(r"```python\n(\"\"\"Brightness.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    (tmp_path / "brightness.py").write_text(code[1])
    spec = importlib.util.spec_from_file_location("brightness", tmp_path / "brightness.py")
    assert spec
    assert spec.loader
    module = sys.modules["brightness"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        check_detector(module.Brightness)
    finally:
        del sys.modules["brightness"]
