"""What a command writes, and how it ends: tables or JSON on stdout, errors on stderr, an exit status for scripts.

Exit status 0: done. 1: refused, not found or not valid: the same call fails again. 2: the command line makes no sense.
3: a service was away or full: the same call may succeed later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import typer
from rich.console import Console

from slora_client.errors import SloraRequestError

REFUSED, AWAY = 1, 3
_NOT_OURS = {"UNAVAILABLE": "no service answers there", "UNIMPLEMENTED": "another service answers there"}
_WHERE = (
    "--gateway or SLORA_GATEWAY (host:port) says where the gateway is, "
    "--store or SLORA_ADAPTER_STORE where the store is"
)
_WHERE_KEYS_ARE = " (slora takes it from SLORA_API_KEY; `slora tenants` and `slora keys` from SLORA_ADMIN_KEY)"
_PIPE_WIDTH = 240  # a pipe has no width: whoever reads it wants whole lines


def console(stderr: bool = False) -> Console:
    """For people: colours where there is a terminal."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if is_terminal else _PIPE_WIDTH)


def told(error: SloraRequestError) -> str:
    """The error in a line. What gRPC says by itself names no remedy: that line begins with how an address is given."""
    found = "" if error.reason else _NOT_OURS.get(error.code, "")
    if found:
        return f"{error.code}: {found}: {_WHERE} ({error.message})"
    return f"{error}{_WHERE_KEYS_ARE}" if error.code == "UNAUTHENTICATED" else str(error)


def status_of(error: SloraRequestError) -> int:
    """The exit status that says so to scripts."""
    return AWAY if error.is_worth_retrying else REFUSED


def write_json(value: object) -> None:
    """One JSON document on stdout; values of this package as objects, times in ISO 8601."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2))


@contextlib.contextmanager
def explained(as_json: bool) -> Iterator[None]:
    """Turns errors into a message on stderr and an exit status."""
    try:
        yield
    except SloraRequestError as error:
        fields: dict[str, Any] = {"code": error.code, "reason": error.reason, "message": error.message}
        _fail(as_json, {**fields, "metadata": error.metadata}, told(error), status_of(error))
    except (OSError, ValueError) as error:
        _fail(as_json, {"code": "", "reason": "", "message": str(error)}, str(error), REFUSED)


def _fail(as_json: bool, fields: dict[str, Any], message: str, status: int) -> None:
    typer.echo(json.dumps({"error": fields}, ensure_ascii=False) if as_json else f"slora: {message}", err=True)
    raise typer.Exit(status)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
