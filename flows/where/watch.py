"""How a run is watched: one live table in the terminal, artifacts in the Prefect UI."""

from __future__ import annotations

import base64
import io
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from PIL import Image
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from flows.where.runners import running_on
from storage.nights import Decision
from storage.records import RunRecord
from storage.store import Store
from tasks.core.progress import listening

if TYPE_CHECKING:
    from rich.progress import TaskID

logger = logging.getLogger(__name__)


_TELL_EVERY_S = 10.0
_PICTURES = 60
"""Cells of a run whose maps and losses are shown in the UI; the report has all."""
_ROWS = 12
"""Cells under way that the terminal names."""


class Watch:
    """Shows how far a run has come."""

    def __init__(self, store: Store, name: str) -> None:
        """Nothing is expected yet; `name` is the flow's."""
        self.store, self.name = store, name
        self.terminal = terminal = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=terminal,
        )
        self.line: TaskID = self.bar.add_task(name, total=None)
        self.heard: dict[str, TaskID] = {}
        self.under_way: Sequence[tuple[str, str]] = ()
        """(cell, its step) of those on their way."""
        self.live = (
            Live(console=terminal, transient=True, get_renderable=self._screen) if terminal.is_terminal else None
        )
        self.listening = listening(self._hear)
        self.progress: UUID | None = None
        self.expected = self.pictures = 0
        self.told = -_TELL_EVERY_S

    def __enter__(self) -> Self:
        created = create_progress_artifact(progress=0.0, key=self.name, description="share that is finished")
        self.progress = created if isinstance(created, UUID) else None
        dashboard = getattr(running_on(), "dashboard", None)
        if dashboard is not None:
            logger.info("Dask dashboard: %s", dashboard)
            self.terminal.print(f"Dask at {dashboard}", style="dim", highlight=False, soft_wrap=True)
        if self.live is not None:
            self.live.start()
        self.listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listening.__exit__(None, None, None)
        if self.live is not None:
            self.live.stop()

    def expect(self, units: int) -> None:
        """So many cells, or categories, are to come."""
        self.expected = units
        self.bar.update(self.line, total=units)

    def finished(self, units: int, what: str) -> None:
        """So many of them are finished; `what` tells the last of them, or their sum."""
        self.bar.update(self.line, completed=units, description=what)
        if time.monotonic() - self.told >= _TELL_EVERY_S or units == self.expected:
            self.told = time.monotonic()
            self._tell(units / max(1, self.expected))
            logger.info("%s: %d of %d, %s", self.name, units, self.expected, what)

    def _tell(self, share: float) -> None:
        if self.progress is not None:
            update_progress_artifact(self.progress, progress=round(100 * share, 1))

    def _hear(self, what: str, done: int, of: int | None) -> None:
        """A step of this process tells how far it has come."""
        if what not in self.heard:
            self.heard[what] = self.bar.add_task(what, total=of)
        self.bar.update(self.heard[what], completed=done, total=of)
        if of is not None and done >= of:
            self.bar.remove_task(self.heard.pop(what))

    def _screen(self) -> RenderableType:
        table = Table("under way", "at, or waiting for", box=None)
        for cell, step in self.under_way[:_ROWS]:
            table.add_row(escape(cell), step)
        if len(self.under_way) > _ROWS:
            table.add_row(f"and {len(self.under_way) - _ROWS} more", "")
        return Group(self.bar.get_renderable(), table) if self.under_way else self.bar.get_renderable()

    def show(self, records: Sequence[RunRecord]) -> None:
        """A cell has ended: its pictures, and now and then the table of all so far."""
        from tasks.report.benchmark.pictures import sample_picture
        from tasks.report.benchmark.training import loss_picture, losses_of

        last, failed = records[-1], sum(record.status == "failed" for record in records)
        due = time.monotonic() - self.told >= _TELL_EVERY_S
        self.finished(len(records), f"{len(records) - failed} done, {failed} failed")
        if due:
            self._table(records)
        if last.status == "done" and self.pictures < _PICTURES:
            self.pictures += 1
            self._picture("maps", last, sample_picture(self.store, last))
            losses = losses_of(last)
            if losses is not None:
                self._picture("losses", last, loss_picture(losses))

    def _table(self, records: Sequence[RunRecord]) -> None:
        from tasks.report.benchmark.export import result_table_markdown

        create_markdown_artifact(result_table_markdown(records), key="results", description="cells so far")

    def _picture(self, what: str, record: RunRecord, picture: Image.Image) -> None:
        create_markdown_artifact(
            f"![{what}](data:image/jpeg;base64,{_small_jpeg(picture)})",
            key=_key(what, record.method, record.dataset, record.category, str(record.seed)),
            description=f"{what}: {record.method} on {record.dataset}/{record.category}, seed {record.seed}",
        )

    def trials(self, rows: Sequence[dict[str, Any]], path: str) -> None:
        """All is done, and so the trials did; `path` has more of them."""
        self._tell(1.0)
        create_table_artifact(list(rows), key="trials", description=f"trials, best first; every rung: {path}")

    def decided(self, decisions: Sequence[Decision]) -> None:
        """What a night decided about each model."""
        rows = [
            {
                "model": decision.name,
                "outcome": decision.outcome,
                "in use": "none" if decision.champion is None else decision.champion,
                "alarms": len(decision.alarms),
                "held": len(decision.held),
                "why": decision.why,
                "look at": "; ".join(decision.alarms + decision.asks),
            }
            for decision in decisions
        ]
        create_table_artifact(rows, key="decisions", description="what the night decided about each model, and why")

    def report(self, path: str, records: Sequence[RunRecord] = ()) -> None:
        """A page is written, and so all is done."""
        self._tell(1.0)
        if records:
            self._table(records)
        name = Path(path).name
        key = "report" if name == "index.html" else _key(Path(path).stem)
        create_markdown_artifact(f"[{name}](file://{path})\n\n`{path}`", key=key, description="where the page lies")


def _small_jpeg(picture: Image.Image) -> str:
    """The picture as base64, some tens of kB: the UI shows nothing of a markdown artifact of a megabyte."""
    small = io.BytesIO()
    picture.thumbnail((800, 800))
    picture.save(small, "JPEG", quality=75)
    return base64.b64encode(small.getvalue()).decode()


def _key(*parts: Iterable[str]) -> str:
    """An artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(str(part) for part in parts).lower()).strip("-")
