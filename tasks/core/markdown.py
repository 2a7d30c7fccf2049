"""Markdown in which no name breaks out: tables of the report and of the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(escaped, head)) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """The text with signs escaped: names come from folders, and must neither break the table nor become HTML where
    Markdown is rendered."""
    for given, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(given, safe)
    return text
