"""Whether a Prefect server answers at the address that the environment gives, and what is wrong where none does."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from urllib.parse import SplitResult, urlsplit

from flows.where.server import LOOPBACK, ServerError, is_local

_WITHIN_S = 5.0
"""Seconds of a process in which an address must answer: a server that starts does so while the command imports."""
_PATIENCE_S = 2.0
"""With somebody who accepts a call and says nothing; at least."""
_TRUE = ("1", "true", "yes", "on", "t", "y")
_began = time.monotonic()


class Silent(Exception):
    """Nobody answers, who may yet come."""


class Wrong(Exception):
    """What answers, or the address itself, will not change."""


def check_given(url: str) -> None:
    """Raises ServerError when the address is the environment's and no Prefect server answers there."""
    told = None if is_local(url) else problem(url, _began + _WITHIN_S)
    if told is not None:
        raise ServerError(told)


def problem(url: str, deadline: float) -> str | None:
    """Why no Prefect server answers there, with what to do; None when one does. `deadline` (as `time.monotonic`): of
    one that may be starting."""
    while True:
        try:
            _look(url, deadline)
            return None
        except Wrong as error:
            return f"no Prefect server answers at {shown(url)} (PREFECT_API_URL): {error}"
        except Silent as error:
            if time.monotonic() > deadline:
                todo = "start it, give the address of one that runs, or unset PREFECT_API_URL: then `al` starts its own"
                return f"no Prefect server answers at {shown(url)} (PREFECT_API_URL): {error}; {todo}"
        time.sleep(0.2)


def shown(url: str) -> str:
    """The address without a password."""
    return url.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "") if "@" in url else url


def _look(url: str, deadline: float) -> None:
    """Raises Silent or Wrong when the API's health is not told there."""
    address = _parts(url)
    if str(address.hostname).endswith(".prefect.cloud"):
        return  # it tells its health elsewhere
    try:
        if _is_healthy(url, deadline):
            return
        found = "what answers there is something else"
    except urllib.error.HTTPError as error:
        found = f"it is answered with {error.code} {error.reason}"
        if error.code in (502, 503, 504):
            raise Silent(f"{found}{_proxy(address)}") from error
        if error.code in (401, 403):
            if {"PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"} & os.environ.keys():
                return  # whether they fit, Prefect's client will find
            found += "; set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    except (OSError, http.client.HTTPException) as error:
        _judge(error, address)
    if not address.path.rstrip("/").endswith("/api") and _is_api(f"{url.rstrip('/')}/api", deadline):
        raise Wrong(f"its path is missing; export PREFECT_API_URL={shown(url).rstrip('/')}/api")
    raise Wrong(f"{found}{_proxy(address)}; give the address of a Prefect server, such as http://127.0.0.1:4200/api")


def _parts(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        raise Wrong("that is no address; expected is http://HOST:PORT/api, such as http://127.0.0.1:4200/api")
    return address


def _judge(error: Exception, address: SplitResult) -> None:
    """Raises Silent or Wrong for what came instead of an answer."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        todo = "PREFECT_API_SSL_CERT_FILE names the file of an authority of your own"
        raise Wrong(f"its certificate is not trusted ({reason.verify_message}); {todo}") from error
    if isinstance(reason, ssl.SSLError):
        raise Wrong("what answers there does not speak https; try http://") from error
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        raise Wrong("what answers there does not speak http; try https://, or another port") from error
    text = getattr(reason, "strerror", None) or str(reason)
    if isinstance(reason, TimeoutError):
        text = "it says nothing"
    raise Silent(f"{text}{_proxy(address)}") from error


def _is_api(url: str, deadline: float) -> bool:
    try:
        return _is_healthy(url, deadline)
    except (OSError, http.client.HTTPException):
        return False


def _is_healthy(url: str, deadline: float) -> bool:
    """Whether a Prefect API says so there; its user interface answers any path with a page."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=_tls())]
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))  # urllib does not find ::1 in no_proxy
    left = max(_PATIENCE_S, deadline - time.monotonic())
    with urllib.request.build_opener(*handlers).open(f"{url.rstrip('/')}/health", timeout=left) as answer:
        try:
            return json.loads(answer.read(1000)) is True
        except ValueError:
            return False


def _tls() -> ssl.SSLContext:
    """As Prefect's client has it."""
    context = ssl.create_default_context(cafile=os.environ.get("PREFECT_API_SSL_CERT_FILE"))
    if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in _TRUE:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _proxy(address: SplitResult) -> str:
    """That a proxy was asked, where one was."""
    proxies, host = urllib.request.getproxies(), address.hostname or ""
    if address.scheme not in proxies or host in LOOPBACK or urllib.request.proxy_bypass(host):
        return ""
    return f" (asked through the proxy of the environment; no_proxy={host} asks it directly)"
