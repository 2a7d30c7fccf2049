"""Great Expectations itself: how the rules fare on a table, and its own pages about it."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.validate.rules import Rule

_LOCK = threading.Lock()  # its data context is global to the process
_SEVERITIES = {"stop": "critical", "reject": "critical", "warn": "warning"}


@dataclass(frozen=True)
class RuleOutcome:
    """How a rule fared."""

    success: bool
    rows: np.ndarray
    """Labels of the table's rows that break it; none where it is about the table as a whole."""


def ask(rules: Sequence[Rule], tables: Mapping[str, pd.DataFrame]) -> dict[str, RuleOutcome]:
    """Rule -> how it fares on its table; one call at a time in a process.

    Raises RuntimeError for an expectation that could not be evaluated.
    """
    outcomes: dict[str, RuleOutcome] = {}
    with _LOCK:
        gx, context = _great_expectations()
        for name, table in tables.items():
            own = [rule for rule in rules if rule.table == name]
            if own:
                # Rows are told by their labels: naming them by columns makes a dictionary of each.
                complete = {"result_format": "COMPLETE", "return_unexpected_index_query": False}
                batch = context.data_sources.pandas_default.read_dataframe(table[_columns(own) or ["key"]])
                results = batch.validate(_suite(gx, name, own), result_format=complete).results
                outcomes |= {result.expectation_config.meta["rule"]: _outcome(result) for result in results}
    return outcomes


def write_docs(rules: Sequence[Rule], tables: Mapping[str, pd.DataFrame], title: str, folder: Path) -> Path:
    """Great Expectations' Data Docs of these rules on these tables; the path of their first page."""
    site = {
        "class_name": "SiteBuilder",
        "site_name": title,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    with _LOCK:
        gx, shared = _great_expectations()
        context = gx.get_context(mode="ephemeral")  # of its own: what is validated here is to be on these pages alone
        try:
            context.variables.progress_bars = {"globally": False}
            for name in list(context.get_site_names()):
                context.delete_data_docs_site(name)
            context.add_data_docs_site("pages", site)
            for name, table in tables.items():
                own = [rule for rule in rules if rule.table == name]
                if own:
                    _run_checkpoint(gx, context, name, own, table)
            context.build_data_docs(site_names=["pages"])
        finally:
            gx.data_context.data_context.context_factory.set_context(shared)
    return folder / "index.html"


def _run_checkpoint(gx: Any, context: Any, name: str, rules: Sequence[Rule], table: pd.DataFrame) -> None:
    suite = context.suites.add(_suite(gx, name, rules))
    asset = context.data_sources.add_pandas(f"the {name}").add_dataframe_asset(name)
    whole = asset.add_batch_definition_whole_dataframe(name)
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=whole, suite=suite))
    named = {"result_format": "COMPLETE", "unexpected_index_column_names": [_name_column(table)]}
    named["return_unexpected_index_query"] = False
    checkpoint = gx.Checkpoint(name=name, validation_definitions=[definition], result_format=named)
    context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": table})


def _columns(rules: Sequence[Rule]) -> list[str]:
    """The columns that the rules look at: the others would be copied with each."""
    names = [rule.arguments.get(given) for rule in rules for given in ("column", "column_A", "column_B")]
    return list(dict.fromkeys(name for name in names if name is not None))


def _name_column(table: pd.DataFrame) -> str:
    return "key" if "key" in table else "subset"


def _suite(gx: Any, name: str, rules: Sequence[Rule]) -> Any:
    expectations = [
        getattr(gx.expectations, rule.expectation)(
            **rule.arguments,
            description=rule.description,
            severity=_SEVERITIES[rule.severity],
            meta={"rule": rule.name},
        )
        for rule in rules
    ]
    return gx.ExpectationSuite(name=name, expectations=expectations)


@cache
def _great_expectations() -> tuple[Any, Any]:
    """The module and a context without files; imported here because it takes seconds and a kept verdict needs none."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own imports use a deprecated module of Python
        import great_expectations as gx
    # This module logs a temporary folder that is gone by then, at a level of its own.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    return gx, context


def _outcome(result: Any) -> RuleOutcome:
    """The outcome of an expectation. Raises RuntimeError where it could not be evaluated, which would pass for a broken
    rule."""
    if not {"element_count", "observed_value"} & set(result.result):
        raise RuntimeError(
            f"Great Expectations could not evaluate {result.expectation_config}: {result.exception_info}"
        )
    rows = result.result.get("unexpected_index_list") or ()
    return RuleOutcome(bool(result.success), np.asarray(rows, dtype=np.int64))
