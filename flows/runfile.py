"""What to run, as a file (TOML), as the parameters of the flow (a form in the Prefect UI), as the command's options."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from al_models.registry import METHODS, create
from tasks.handles import Cell
from tasks.policy import Policy


class RunFileError(ValueError):
    """A run file that cannot be used."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSource(_Strict):
    """A data set and where it lies."""

    dataset: str = Field(description="Name of the layout: see `al datasets`")
    root: str = Field(description="Folder of the data set")
    categories: list[str] | None = Field(None, description="Some of its categories; all when left out")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the layout: see `al datasets show NAME`")


class MethodRun(_Strict):
    """A method and the parameters that differ from its paper's."""

    name: str = Field(description="Name of the method: see `al methods`")
    params: dict[str, Any] = Field(default_factory=dict)


class _Run(_Strict):
    """What every run is about, and where."""

    data: list[DataSource] = Field(min_length=1)
    store: str = Field("al-store", description="Folder or URL where outputs are kept and found again")
    report: str = Field("al-report", description="Folder the report is written to")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    validation: Policy = Field(default_factory=Policy, description="What is expected of the images, and what follows")
    runner: Literal["threads", "dask"] | Annotated[str, Field(pattern=r"^(tcp|tls)://")] = Field(
        "threads", description="threads, dask (local processes) or the address of a Dask scheduler, tcp://..."
    )
    workers: int | None = Field(None, ge=1, description="Steps at once (threads) or processes (dask)")
    threads: int | None = Field(
        None,
        ge=1,
        description="Cores that a step computes with: when left out, 1 on Dask and a share of all cores on `threads`. "
        "The last bits of what a CPU trains and predicts depend on it, and on no other choice of where a run runs",
    )

    step_minutes: float = Field(
        24 * 60,
        gt=0,
        description="On Dask, a step that takes longer is taken for hung, and its worker is ended",
    )

    def _data_title(self) -> str:
        return ", ".join(f"{s.dataset}/{'+'.join(s.categories)}" if s.categories else s.dataset for s in self.data)

    def _check_data(self) -> None:
        """Raises DatasetError for a data set or an option that does not exist, before anything is started."""
        from storage.datasets import check_options

        for source in self.data:
            check_options(source.dataset, source.options)


class IngestRun(_Run):
    """Data sets to take in and to judge, with nothing learned from them."""

    download: bool = Field(False, description="Fetch the data sets first, where their authors offer a direct address")
    data_docs: bool = Field(True, description="Build Great Expectations' own pages, too, in `data_docs` of the report")

    @property
    def title(self) -> str:
        """For people, in the UI."""
        return self._data_title()

    def check(self) -> IngestRun:
        """The same, once every data set and option in it exists. Raises DatasetError with the nearest names."""
        self._check_data()
        return self


class RunFile(_Run):
    """A benchmark: each method on each category with each seed."""

    methods: list[MethodRun] = Field(default_factory=list, description="All methods when left out")
    seeds: list[int] = Field(default=[0], min_length=1)
    false_reject_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def asked_methods(self) -> list[MethodRun]:
        """The methods to run, all of the registry when none is named."""
        return self.methods or [MethodRun(name=name) for name in METHODS]

    def cells(self, dataset: str, category: str) -> list[Cell]:
        """The cells of a category, in the order of the run."""
        return [
            Cell(dataset, category, method.name, method.params, seed, self.device, self.false_reject_rate)
            for method in self.asked_methods()
            for seed in self.seeds
        ]

    @property
    def title(self) -> str:
        """For people, in the UI: what is compared on what."""
        return f"{self._data_title()}: {', '.join(dict.fromkeys(m.name for m in self.methods)) or 'all methods'}"

    def check(self) -> RunFile:
        """The same, once every method, data set and option in it exists. Raises an error with the nearest names."""
        for method in self.asked_methods():
            create(method.name, **method.params)
        self._check_data()
        return self


_OF_A_BENCHMARK = set(RunFile.model_fields) - set(IngestRun.model_fields)
_AnyRun = TypeVar("_AnyRun", RunFile, IngestRun)


def read_run_file(path: Path, model: type[_AnyRun] = RunFile) -> _AnyRun:  # type: ignore[assignment]
    """The run a TOML file describes; relative folders in it start at the current folder. Raises RunFileError.

    A benchmark's file describes an ingest too: what is to be learned is left out.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        if model is IngestRun:
            values = {key: value for key, value in values.items() if key not in _OF_A_BENCHMARK}
        return model.model_validate(values)
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise RunFileError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        raise RunFileError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """What is wrong in words; an unknown key comes with the keys that are known there."""
    run = IngestRun if error.title == "IngestRun" else RunFile
    return "; ".join(_explain_one(item, run) for item in error.errors())


def _explain_one(item: Any, run: type[_Run]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']} (given: {item['input']!r})"
    model = {"data": DataSource, "methods": MethodRun, "validation": Policy}.get(str(item["loc"][0]), run)
    known = model if len(item["loc"]) > 1 else run
    return f"{where}: unknown key; known are {', '.join(sorted(known.model_fields))}"
