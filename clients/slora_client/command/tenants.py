"""`slora tenants …`: who uses a gateway, and how much they may; one function a command."""

from __future__ import annotations

from typing import Annotated

import typer

from slora_client.admin_client import AdminClient
from slora_client.command.keys import TimeoutOption
from slora_client.command.options import DEFAULT_GATEWAY, GatewayOption, JsonOption, admin_key, tls
from slora_client.command.outcome import console, explained, write_json
from slora_client.command.tables import tenants_table
from slora_client.values import Tenant

app = typer.Typer(no_args_is_help=True, help="Tenants and their limits. SLORA_ADMIN_KEY has the gateway's admin key.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The tenant.")]


@app.command("set")
def set_(
    name: NameArgument,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, help="0: no limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0, help="Of prompts and answers; 0: no limit.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=0, help="Requests at a time; 0: no limit.")] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Adapters that it may use: 'team-*,name'; '' for the base model only.")
    ] = None,
    max_priority: Annotated[
        int | None,
        typer.Option(min=-10, max=10, help="Highest that its requests may have; below 0 each has to say its priority."),
    ] = None,
    gateway: GatewayOption = DEFAULT_GATEWAY,
    timeout: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant, or change what is given of it. A new one has no limits, no adapters, and priorities up to 0."""
    patterns = None if adapters is None else [part.strip() for part in adapters.split(",") if part.strip()]
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        changed = client.set_tenant(
            name,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_concurrent=max_concurrent,
            adapter_patterns=patterns,
            max_priority=max_priority,
            timeout=timeout,
        )
        _show([changed], as_json)


@app.command()
def show(
    name: NameArgument,
    gateway: GatewayOption = DEFAULT_GATEWAY,
    timeout: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Show a tenant."""
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        _show([client.get_tenant(name, timeout=timeout)], as_json)


@app.command()
def ls(gateway: GatewayOption = DEFAULT_GATEWAY, timeout: TimeoutOption = 30.0, as_json: JsonOption = False) -> None:
    """List tenants."""
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        found = client.list_tenants(timeout=timeout)
        if as_json:
            write_json(found)
        else:
            console().print(tenants_table(found))


def _show(tenants: list[Tenant], as_json: bool) -> None:
    if as_json:
        write_json(tenants[0])
    else:
        console().print(tenants_table(tenants))
