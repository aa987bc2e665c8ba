"""The command's root: registers what the other modules offer, and tells failures in one line."""

from __future__ import annotations

import sys

import typer

from slora_client.command import adapters, generation, keys, tenants
from slora_client.command.outcome import status_of, told
from slora_client.errors import SloraRequestError

USAGE, INTERRUPTED = 2, 130

app = typer.Typer(
    name="slora",
    help="Use a slora gateway, and keep its adapters and tenants.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(generation.app)
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")


def main() -> None:
    """Exits with 0, 1 (a request failed), 2 (wrong usage), 3 (the same may succeed later) or 130 (Ctrl-C)."""
    try:
        app()
    except SloraRequestError as error:
        sys.stderr.write(f"slora: {told(error)}\n")
        raise SystemExit(status_of(error)) from None
    except ValueError as error:  # an option that no request can carry, such as a negative count
        sys.stderr.write(f"slora: {error}\n")
        raise SystemExit(USAGE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
