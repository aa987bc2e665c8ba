"""`slora keys …`: the API keys of a gateway, one function a command."""

from __future__ import annotations

from typing import Annotated

import typer

from slora_client.admin_client import AdminClient
from slora_client.command.options import DEFAULT_GATEWAY, GatewayOption, JsonOption, admin_key, tls
from slora_client.command.outcome import console, explained, write_json
from slora_client.command.tables import keys_table

app = typer.Typer(no_args_is_help=True, help="API keys. SLORA_ADMIN_KEY has the gateway's admin key.")

TimeoutOption = Annotated[float, typer.Option(help="Seconds that a call may take.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose it is to be.")],
    label: Annotated[str, typer.Option(help="A note for people.")] = "",
    gateway: GatewayOption = DEFAULT_GATEWAY,
    timeout: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it. It is shown this once: the gateway keeps only a digest."""
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        text, key = client.create_key(tenant, label=label, timeout=timeout)
        if as_json:
            write_json({"api_key": text, "key": key})
        else:
            typer.echo(text)
            console(stderr=True).print(f"key {key.key_id} of {key.tenant}; it is shown this once")


@app.command()
def ls(
    tenant: Annotated[str, typer.Argument(help="Only this tenant's.")] = "",
    gateway: GatewayOption = DEFAULT_GATEWAY,
    timeout: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """List keys, without their secrets."""
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        found = client.list_keys(tenant=tenant, timeout=timeout)
        if as_json:
            write_json(found)
        else:
            console().print(keys_table(found))


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="The 16 digits behind sk-slora-.")],
    gateway: GatewayOption = DEFAULT_GATEWAY,
    timeout: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Revoke a key: gateways refuse it within seconds; requests that run go on to their end."""
    with explained(as_json), AdminClient(gateway, admin_key(), tls()) as client:
        client.revoke_key(key_id, timeout=timeout)
        if as_json:
            write_json({"key_id": key_id})
        else:
            console().print(f"key {key_id} is revoked")
