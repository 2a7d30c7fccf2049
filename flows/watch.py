"""How a run is watched: a bar in the terminal, artifacts in the Prefect UI."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
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

if TYPE_CHECKING:
    from rich.progress import TaskID


class Watch:
    """Follows the steps of a run."""

    def __init__(self, store: Store, cells: Sequence[dict[str, PrefectFuture[Any]]]) -> None:
        """Nothing is done yet. `cells`: the steps of each cell; steps that cells share are counted once."""
        self.store = store
        self.waiting = {id(future): future for steps in cells for future in steps.values()}
        self.of = max(1, len(self.waiting))
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
        self.line: TaskID = self.bar.add_task("starting", total=self.of)
        self.progress: UUID | None = None

    def __enter__(self) -> Self:
        created = create_progress_artifact(progress=0.0, key="benchmark", description="steps finished")
        self.progress = created if isinstance(created, UUID) else None
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def done(self, future: PrefectFuture[Any]) -> None:
        """A step has ended."""
        self.waiting.pop(id(future), None)
        self.bar.update(self.line, completed=self.of - len(self.waiting))

    def show(self, records: Sequence[RunRecord]) -> None:
        """A cell has ended: the table of all so far, and its pictures."""
        from tasks.report import result_table_markdown, sample_picture

        last = records[-1]
        self.bar.update(self.line, description=f"{last.method} {last.dataset}/{last.category}: {last.status}")
        if self.progress is not None:
            update_progress_artifact(self.progress, progress=round(100 * (1 - len(self.waiting) / self.of), 1))
        create_markdown_artifact(result_table_markdown(records), key="results", description="cells so far")
        if last.status == "done":
            picture = _small_jpeg(sample_picture(self.store, last))
            create_markdown_artifact(
                f"![anomaly maps](data:image/jpeg;base64,{picture})",
                key=_key("maps", last.method, last.dataset, last.category, str(last.seed)),
                description=f"{last.method} on {last.dataset}/{last.category}, seed {last.seed}",
            )

    def report(self, path: str) -> None:
        """The report is written."""
        create_markdown_artifact(f"[index.html](file://{path})\n\n`{path}`", key="report", description="the report")


def _small_jpeg(png: bytes) -> str:
    """The picture as base64, some tens of kB: the UI shows nothing of a markdown artifact of a megabyte."""
    image, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.thumbnail((800, 800))
    image.save(small, "JPEG", quality=75)
    return base64.b64encode(small.getvalue()).decode()


def _key(*parts: Iterable[str]) -> str:
    """An artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(str(part) for part in parts).lower()).strip("-")
