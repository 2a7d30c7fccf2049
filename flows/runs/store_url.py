"""The store as a parameter of a flow."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from storage.store import PASSWORD, check_url

# The pattern is for the Prefect server, which keeps the parameters of a run: it takes none that hold a password.
StoreUrl = Annotated[str, AfterValidator(check_url), Field(json_schema_extra={"pattern": f"^(?!.*{PASSWORD})"})]
"""A folder or a URL without a password."""
