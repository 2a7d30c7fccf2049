"""The data page: may these images be learned from, what was found in them, and what do they look like.

It judges nothing: every verdict, reason and score comes out of what validation stored, every picture out of the
prepared images. One HTML page without scripts that asks nothing of any other place, and `findings.csv` with all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.datasets import about
from storage.errors import DatasetError, NotInStore, StorageError
from storage.listing import Dataset
from storage.store import Store
from storage.tables import read_table
from storage.whole import write_whole
from tasks.core.handles import Category
from tasks.report.data.judgement import MEASURES, SEVERITIES, STATES, SUSPECTED, Budget, Stored, view_of
from tasks.report.data.thumbnails import Thumbnails
from tasks.report.page import environment
from tasks.validate import FINDINGS
from tasks.validate import findings as read_findings

PAGE = "data.html"
CSV = "findings.csv"
DOCS = "data_docs"
"""Folder of Great Expectations' own pages, beside the page."""

_FACT = ["key", "path", "split", "label", "defect_type", "readable", "width", "height", "mask_fraction", *MEASURES]
_SUSPECT = ("id", "key", "score", "deviations", "suspected", "x", "y")
_CSV = ("dataset", "category", "severity", "rule", "path", "split", "label", "defect_type", "reason", "key", "id")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """Where the judgement on a category lies in the store."""

    category: Category
    """The category; an empty `catalogue` means that it is not known any more."""
    images: str
    """Key of the prepared images."""
    verdict: str
    """Key of the verdict."""
    suspects: str | None = None
    """Key of the training images' scores; None where they were not asked for."""


@task(name="data report", task_run_name="data report", cache_policy=NO_CACHE)
def data_report(store_url: str, out: str, judged: list[Judged], docs: bool = False) -> str:
    """Write data.html and findings.csv to the local folder `out`; the path of data.html. `docs`: Great Expectations'
    own pages were built beside it."""
    return write_data_page(Store(store_url), out, judged, docs=docs)


def write_data_page(store: Store, folder: str | Path, judged: Sequence[Judged], *, docs: bool = False) -> str:
    """Write data.html and findings.csv; the path of data.html. What the store has lost becomes a sentence."""
    folder, budget = Path(folder).absolute(), _budget(len(judged))
    datasets = {name: _about(name) for name in sorted({one.category.dataset for one in judged})}
    views, tables = [], []
    for number, one in enumerate(judged, start=1):
        stored = read(store, one)
        published = (stored.meta or {}).get("published", {})
        unreadable = stored.facts.loc[~stored.facts["readable"], "key"]
        thumbnails = Thumbnails(store, one.images, stored.facts["key"].tolist(), unreadable)
        views.append(view_of(stored, f"category-{number}", _name(one, judged), published, thumbnails, budget))
        tables.append(_all_findings(one.category, stored))
    states = Counter(view.state for view in views)
    page = environment().get_template("data/data.html.j2")
    text = page.render(
        views=views,
        docs=[f"{DOCS}/{one.category.name}/index.html" if docs else None for one in judged],
        states={state: states[state] for state in STATES if state in states},
        state_words=STATES,
        datasets=datasets,
        severities=SEVERITIES,
        suspected=SUSPECTED,
        csv=CSV,
    )
    write_whole(folder / CSV, _csv(tables))
    write_whole(folder / PAGE, text)
    return str(folder / PAGE)


def _budget(categories: int) -> Budget:
    """The budget of a category: about 400 kB up to 6 categories, less where there are more, so that the page stays a
    page."""
    if categories <= 6:
        return Budget(side=128, shots=24, sheet=40)
    return Budget(side=96, shots=12, sheet=20) if categories <= 20 else Budget(side=72, shots=8, sheet=12)


def _name(one: Judged, judged: Sequence[Judged]) -> str:
    """The name of a category; with its data set where there are several, with its key where it was judged more than
    once."""
    several = len({other.category.dataset for other in judged}) > 1
    name = one.category.name if several else one.category.category
    again = sum(other.category.name == one.category.name for other in judged) > 1
    return f"{name}, verdict {one.verdict.rsplit('/', 1)[-1]}" if again else name


def _about(dataset: str) -> Dataset | None:
    try:
        return about(dataset)
    except DatasetError:
        return None


# reading


def read(store: Store, judged: Judged) -> Stored:
    """What the store holds of a judged category; what it has lost is empty and a sentence in `problems`."""
    problems: list[str] = []

    def asked(what: str, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except NotInStore:
            problems.append(f"{what} is not in the store; run the step that makes it.")
        except (StorageError, OSError, KeyError, ValueError) as error:  # Arrow's own errors are ValueErrors
            problems.append(f"{what} could not be read ({error}).")
        return otherwise

    def table(what: str, ask: Callable[[], pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
        return asked(what, ask, pd.DataFrame({column: [] for column in columns}, dtype=object))

    def output(key: str, file: str, columns: Sequence[str]) -> Callable[[], pd.DataFrame]:
        return lambda: read_table(store, f"{store.get(key).folder}/{file}", columns)

    facts = table("The table of images", output(judged.images, "facts.parquet", _FACT), _FACT)
    findings = table("The table of findings", lambda: read_findings(store, judged.verdict), FINDINGS)
    meta = asked("The verdict", lambda: store.get(judged.verdict).meta, None)
    aside, catalogue = None, judged.category.catalogue
    if catalogue:
        aside = asked("The catalogue", lambda: store.get(catalogue).meta["set_aside"], None)
    suspects, key = None, judged.suspects
    if key is not None:
        suspects = table("The table of suspects", output(key, "suspects.parquet", _SUSPECT), _SUSPECT)
        suspects = suspects.astype({"suspected": bool})
        severity = asked("The summary of the suspects", lambda: store.get(key).meta["severity"], "off")
        findings = _with_suspects(findings, suspects, facts, severity)
    return Stored(facts.astype({"readable": bool}), findings, meta, suspects, aside, problems)


def _texts(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype("string").fillna("").astype(object)


def _with_suspects(findings: pd.DataFrame, suspects: pd.DataFrame, facts: pd.DataFrame, severity: str) -> pd.DataFrame:
    """The findings with those about suspects, unless the verdict has them already."""
    if severity == "off" or (findings["rule"] == SUSPECTED).any():
        return findings
    named = suspects[suspects["suspected"]].merge(facts, on="key")
    reasons = [
        f"{value:.1f} robust deviations more unlike the other training images than usual"
        for value in named["deviations"]
    ]
    rows = named.assign(severity=severity, rule=SUSPECTED, reason=reasons)[list(FINDINGS)]
    return pd.concat([findings, _texts(rows)], ignore_index=True)


# findings.csv


def _all_findings(category: Category, stored: Stored) -> pd.DataFrame:
    """Findings, and the files that were left out before there was anything to judge."""
    left_out = pd.DataFrame(stored.left_out or [], columns=["path", "reason"])
    table = pd.concat([stored.findings, left_out.assign(severity="left out", rule="listing")])
    return table.assign(dataset=category.dataset, category=category.category)


def _csv(tables: Sequence[pd.DataFrame]) -> str:
    """All findings as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    table = _texts(pd.concat([pd.DataFrame(columns=list(_CSV), dtype=object), *tables])[list(_CSV)])
    table = table.map(lambda text: f"'{text}" if text.startswith(_FORMULA) else text)
    return str(table.to_csv(index=False, lineterminator="\n"))
