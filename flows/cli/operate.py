"""Commands that operate a Prefect server: serve, alarms."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import urlsplit

import typer

from flows.cli.terminal import console


def alarms(
    url: Annotated[str, typer.Argument(help="Webhook that each alarm of a night is posted to, as JSON.")],
) -> None:
    """Have the Prefect server (PREFECT_API_URL) tell a webhook whenever a night needs a person, or breaks."""
    from flows.where import server
    from flows.where.address import check_given

    if not os.environ.get("PREFECT_API_URL"):
        raise server.ServerError(
            "PREFECT_API_URL is not set: a server that outlives this command tells; start `al serve`, set it"
        )
    with server.connected() as api:
        check_given(api)
        from flows.alerts import tell

        tell(url)
    console.print(f"alarms go to {urlsplit(url).hostname}", soft_wrap=True, highlight=False)  # the rest is a secret


def serve(
    port: Annotated[int, typer.Option(help="Of the Prefect server and its UI.")] = 4200,
) -> None:
    """Start a Prefect server with its UI, a worker and the deployments; stop with Ctrl-C."""
    from flows.serve import serve as run

    run(port, console)
