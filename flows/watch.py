"""How a run is watched: a bar in the terminal, artifacts in the Prefect UI."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from PIL import Image
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from storage.records import RunRecord
from storage.store import Store
from tasks.progress import listening

if TYPE_CHECKING:
    from rich.progress import TaskID


class Watch:
    """Follows the steps of a run."""

    def __init__(self, store: Store, name: str) -> None:
        """Nothing is followed yet; `name` is the flow's."""
        self.store, self.name = store, name
        self.followed: dict[int, PrefectFuture[Any]] = {}
        self.ended: set[int] = set()
        terminal = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,  # in a file or a pipe it would leave empty lines
        )
        self.line: TaskID = self.bar.add_task(name, total=None)
        self.heard: dict[str, TaskID] = {}
        self.listening = listening(self._hear)
        self.progress: UUID | None = None

    def __enter__(self) -> Self:
        created = create_progress_artifact(progress=0.0, key=self.name, description="steps finished")
        self.progress = created if isinstance(created, UUID) else None
        self.bar.start()
        self.listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listening.__exit__(None, None, None)
        self.bar.stop()

    def follow(self, steps: Mapping[str, PrefectFuture[Any]]) -> None:
        """These steps are to come; those that were followed already count once."""
        self.followed |= {id(future): future for future in steps.values()}
        self.bar.update(self.line, total=len(self.followed))

    def first_failure(self, steps: Mapping[str, PrefectFuture[Any]]) -> tuple[str, Exception] | None:
        """Wait for these steps; the first that failed and why, or None."""
        for step, future in steps.items():
            try:
                future.result()
            # A worker that died is Dask's own error and by-passes Prefect's states: it fails these steps, not the run.
            except Exception as error:
                return step, error
            self.ended.add(id(future))
            self.bar.update(self.line, completed=len(self.ended))
        return None

    def _tell(self, share: float) -> None:
        if self.progress is not None:
            update_progress_artifact(self.progress, progress=round(100 * share, 1))

    def _hear(self, what: str, done: int, of: int | None) -> None:
        """A step of this process tells how far it has come."""
        if what not in self.heard:
            self.heard[what] = self.bar.add_task(what, total=of)
        finished = of is not None and done >= of
        self.bar.update(self.heard[what], completed=done, total=of, visible=not finished)

    def show(self, records: Sequence[RunRecord]) -> None:
        """A cell has ended: the table of all so far, and its pictures."""
        from tasks.report import result_table_markdown, sample_picture
        from tasks.report.training import loss_picture, losses_of

        last = records[-1]
        self.bar.update(self.line, description=f"{last.method} {last.dataset}/{last.category}: {last.status}")
        self._tell(len(self.ended) / max(1, len(self.followed)))
        create_markdown_artifact(result_table_markdown(records), key="results", description="cells so far")
        if last.status == "done":
            self._picture("maps", last, sample_picture(self.store, last))
            losses = losses_of(last)
            if losses is not None:
                self._picture("losses", last, loss_picture(losses))

    def _picture(self, what: str, record: RunRecord, picture: bytes) -> None:
        create_markdown_artifact(
            f"![{what}](data:image/jpeg;base64,{_small_jpeg(picture)})",
            key=_key(what, record.method, record.dataset, record.category, str(record.seed)),
            description=f"{what}: {record.method} on {record.dataset}/{record.category}, seed {record.seed}",
        )

    def report(self, path: str) -> None:
        """The report is written, and so all is done."""
        self._tell(1.0)
        create_markdown_artifact(
            f"[{Path(path).name}](file://{path})\n\n`{path}`", key="report", description="the report"
        )


def _small_jpeg(png: bytes) -> str:
    """The picture as base64, some tens of kB: the UI shows nothing of a markdown artifact of a megabyte."""
    image, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.thumbnail((800, 800))
    image.save(small, "JPEG", quality=75)
    return base64.b64encode(small.getvalue()).decode()


def _key(*parts: Iterable[str]) -> str:
    """An artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(str(part) for part in parts).lower()).strip("-")
