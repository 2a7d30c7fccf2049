"""What to run, as a file (TOML), as the parameters of the flow (a form in the Prefect UI), as the command's options."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from al_models.registry import METHODS, create
from flows.runs.device import Device
from flows.runs.search import MethodRun, Range, SearchRun, Strict
from flows.runs.store_url import StoreUrl
from storage.text import read_text
from tasks.core.handles import Cell
from tasks.core.policy import Policy
from tasks.night.gate import Gate

_RATE = "Share of good parts that the threshold may reject; 1 / rate - 1 held-out good images are needed"


class RunFileError(ValueError):
    """A run file that cannot be used."""


def twice(name: str, first: str, second: str) -> str:
    """Why two sources cannot have one name, and what to do about it."""
    return (
        f"{first!r} and {second!r} are both called {name}, and one would take the other's place; give each a name of "
        f'its own: --data folder:NAME={second}, or options = {{category = "NAME"}} in a run file'
    )


class DataSource(Strict):
    """A data set and where it lies."""

    dataset: str = Field(description="Name of the layout: see `al datasets`")
    root: str = Field(description="Folder of the data set")
    categories: list[str] | None = Field(None, description="Some of its categories; all when left out")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the layout: see `al datasets show NAME`")


class Run(Strict):
    """What every run is about, and where."""

    data: list[DataSource] = Field(min_length=1, description="Data sets, and where they lie")
    store: StoreUrl = Field("al-store", description="Folder or URL where outputs are kept and found again")
    report: str = Field("al-report", description="Folder the report is written to")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
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

    rehash: bool = Field(False, description="Read every file again, whatever its size, times and inode say")
    step_minutes: float = Field(
        24 * 60,
        gt=0,
        description="On Dask, a step that takes longer is taken for hung, and its worker is ended",
    )

    def data_title(self) -> str:
        """The data sets, for people."""
        return ", ".join(f"{s.dataset}/{'+'.join(s.categories)}" if s.categories else s.dataset for s in self.data)

    def check_device(self) -> None:
        """Raises InvalidInput for a device that this machine does not have, unless the steps run on others."""
        if self.device.startswith("cuda") and "://" not in self.runner:
            from tasks.core.compute import device_of

            device_of(self.device)

    def check_data(self) -> None:
        """Raises DatasetError for a data set or an option that does not exist, and RunFileError for two folders of one
        name, before anything is started."""
        from storage.datasets import check_options
        from storage.datasets.folder import name_of

        roots: dict[str, str] = {}
        for source in self.data:
            check_options(source.dataset, source.options)
            name = name_of(Path(source.root), source.options) if source.dataset == "folder" else None
            if name in roots:
                raise RunFileError(twice(f"folder/{name}", roots[name], source.root))
            if name is not None:
                roots[name] = source.root


class IngestRun(Run):
    """Data sets to take in and to judge, with nothing learned from them."""

    download: bool = Field(False, description="Fetch the data sets first, where their authors offer a direct address")
    data_docs: bool = Field(True, description="Build Great Expectations' own pages, too, in `data_docs` of the report")

    @property
    def title(self) -> str:
        """For people, in the UI."""
        return self.data_title()

    def check(self) -> IngestRun:
        """The same, once every data set and option in it exists. Raises DatasetError with the nearest names."""
        self.check_data()
        return self


class RunFile(Run):
    """A benchmark: each method on each category with each seed."""

    methods: list[MethodRun] = Field(default_factory=list, description="All methods when left out")
    search: list[SearchRun] = Field(
        default_factory=list, description="Parameters to choose before: `al search`, with what follows in `methods`"
    )
    seeds: list[int] = Field(default=[0], min_length=1, description="Each method runs with each; the spread is shown")
    false_reject_rate: float = Field(0.05, gt=0, lt=1, description=_RATE)

    @field_validator("search", mode="before")
    @classmethod
    def _one_or_several(cls, search: Any) -> Any:
        return [search] if isinstance(search, dict | SearchRun) else search

    def screens(self) -> Gate | None:
        """The gate that new images pass before anything learns from them; a benchmark learns from all."""
        return None

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
        names = dict.fromkeys([*(each.method for each in self.search), *(method.name for method in self.methods)])
        return f"{self.data_title()}: {', '.join(names) or 'all methods'}"

    def check(self) -> RunFile:
        """The same, once every method, data set and option in it exists. Raises an error with the nearest names."""
        for method in self.asked_methods():
            create(method.name, **method.params)
        for search in self.search:
            search.check()
        self.check_data()
        return self

    def check_search(self) -> None:
        """Raises RunFileError for a run in which nothing is to be chosen."""
        if not self.search:
            raise RunFileError(
                "the run has no [search], so there is nothing to choose; add one, such as\n[search]\n"
                'method = "patchcore"\nparams = {coreset_ratio = [0.01, 0.1], neighbourhood = [1, 3, 5]}'
            )

    def check_no_search(self) -> None:
        """Raises RunFileError for a run whose parameters are still to be chosen."""
        if self.search:
            raise RunFileError(
                "the run has a [search], which a benchmark would leave out; `al search RUN_FILE` chooses parameters, "
                "and compares them with the run's methods; or take the table out"
            )


class _Night(RunFile):
    """A benchmark whose new images are screened, and whose models go on from those of the night before."""

    gate: Gate

    def cells(self, dataset: str, category: str) -> list[Cell]:
        return [replace(cell, update=True) for cell in super().cells(dataset, category)]

    def screens(self) -> Gate | None:
        return self.gate


class NightlyRun(Run):
    """A night: each category's model is refitted, proven and perhaps promoted."""

    method: MethodRun = Field(MethodRun(name="padim"), description="What the models are made with")
    seed: int = Field(0, description="Of what the method and the choice of held-out images draw at random")
    false_reject_rate: float = Field(0.05, gt=0, lt=1, description=_RATE)
    gate: Gate = Field(Gate(), description="What a new model has to keep to be put into use")
    keep: int = Field(10, ge=1, description="Newest versions to keep of each model, beside those in use")

    @property
    def title(self) -> str:
        """For people, in the UI."""
        return f"{self.data_title()}: {self.method.name}"

    def as_benchmark(self) -> RunFile:
        """The same steps as any benchmark's, so that a night and a benchmark share what they compute."""
        values = {name: getattr(self, name) for name in Run.model_fields}
        of_night = {"methods": [self.method], "seeds": [self.seed], "gate": self.gate}
        return _Night(**values, **of_night, false_reject_rate=self.false_reject_rate)

    def check(self) -> NightlyRun:
        """The same, once the method, every data set and option in it exists. Raises an error with the nearest names."""
        create(self.method.name, **self.method.params)
        self.check_data()
        return self


class ReportRun(Strict):
    """A store whose pages are written again; nothing is computed."""

    store: StoreUrl = Field("al-store", description="Folder or URL of the records")
    report: str = Field("al-report", description="Folder the pages are written to")

    @property
    def title(self) -> str:
        """For people, in the UI."""
        return self.store


_OF_A_BENCHMARK = set(RunFile.model_fields) - set(IngestRun.model_fields)
_AnyRun = TypeVar("_AnyRun", bound=Run)


def read_run_file(path: Path, model: type[_AnyRun] = RunFile) -> _AnyRun:  # type: ignore[assignment]
    """The run a TOML file describes; relative folders in it start at the current folder. Raises RunFileError.

    A benchmark's file describes an ingest too: what is to be learned is left out.
    """
    try:
        values = tomllib.loads(read_text(path))
        if model is IngestRun:
            values = {key: value for key, value in values.items() if key not in _OF_A_BENCHMARK}
        return model.model_validate(values)
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise RunFileError(f"{path}: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunFileError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        raise RunFileError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """What is wrong in words; an unknown key comes with the keys that are known there."""
    run = {kind.__name__: kind for kind in (IngestRun, NightlyRun)}.get(error.title, RunFile)
    return "; ".join(_explain_one(item, run) for item in error.errors())


def _explain_one(item: Any, run: type[Run]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        given = "" if where == "store" else f" (given: {item['input']!r})"  # it may hold a password
        return f"{where}: {item['msg']}{given}"
    models = {"data": DataSource, "methods": MethodRun, "method": MethodRun, "validation": Policy}
    models |= {"search": SearchRun, "gate": Gate}
    model = Range if "range" in item["loc"] else models.get(str(item["loc"][0]), run)
    known = model if len(item["loc"]) > 1 else run
    return f"{where}: unknown key; known are {', '.join(sorted(known.model_fields))}"


def to_toml(run: Run) -> str:
    """The run as a file that `read_run_file` takes; what is left out is as it is when nothing is said."""
    values = run.model_dump(exclude_defaults=True)
    tables = {name: values.pop(name) for name in ("validation", "data", "methods", "search") if name in values}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    for name, table in tables.items():
        for each in table if isinstance(table, list) else [table]:
            lines += ["", f"[[{name}]]" if isinstance(table, list) else f"[{name}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in _keys_and_values(each)]
    return "\n".join(lines) + "\n"


def _keys_and_values(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys, quoted where they must be, and values; TOML has no word for None, which is what a missing key means."""
    for key, value in table.items():
        if value is not None:
            yield key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key), value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in _keys_and_values(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # also nan and inf, which JSON writes otherwise
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
