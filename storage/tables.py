"""Tables as Parquet files, in memory and in a store."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import pandas as pd

from storage.store import Store


def table_bytes(table: pd.DataFrame, compression: Literal["snappy", "zstd"] = "snappy") -> bytes:
    """The bytes of a Parquet file with the columns of a table, without its index."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression=compression)
    return buffer.getvalue()


def table_of(data: bytes, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The table in a Parquet file, or some of its columns. Raises ValueError, or Arrow's own, for other bytes."""
    return pd.read_parquet(io.BytesIO(data), columns=None if columns is None else list(columns))


def write_table(store: Store, key: str, table: pd.DataFrame, compression: Literal["snappy", "zstd"] = "snappy") -> None:
    """Replace the table under a key, whole or not at all."""
    store.write_bytes(key, table_bytes(table, compression))


def read_table(store: Store, key: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The table under a key, or some of its columns. Raises NotInStore, and as `table_of`."""
    return table_of(store.read_bytes(key), columns)
