"""Options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from slora_client.options import GenerationOptions
from slora_client.tls import Tls

GatewayOption = Annotated[str, typer.Option("--gateway", envvar="SLORA_GATEWAY", help="host:port of the gateway")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy; default 1")]
TopPOption = Annotated[float | None, typer.Option(help="keep the likeliest tokens that sum to this")]
TopKOption = Annotated[int | None, typer.Option(help="keep the k likeliest tokens; 0 keeps all")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="makes sampling reproducible")]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="at most so many new tokens; default: as many as fit")]
StopOption = Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")]
PriorityOption = Annotated[int | None, typer.Option(min=-10, max=10, help="higher is sooner, where engines go by it")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]

DEFAULT_GATEWAY = "localhost:50051"


SYSTEM = "system"
_TLS_VARIABLES = ("SLORA_CA", "SLORA_CERTIFICATE", "SLORA_CERTIFICATE_KEY", "SLORA_SERVER_NAME")


def tls() -> Tls | None:
    """How servers are known, from SLORA_CA (a PEM file; `system`: grpc's own authorities) and its like; None for plain
    text. Raises typer.BadParameter, which ends the command, for what cannot be."""
    ca, certificate, key, server_name = (os.environ.get(name, "") for name in _TLS_VARIABLES)
    if not ca:
        if certificate or key or server_name:
            raise typer.BadParameter("without SLORA_CA nothing is encrypted: set it to a PEM file, or to system")
        return None
    ca = "" if ca == SYSTEM else ca
    for path in filter(None, (ca, certificate, key)):
        if not os.access(path, os.R_OK):
            raise typer.BadParameter(f"{path}, of {', '.join(_TLS_VARIABLES[:3])}, cannot be read")
    try:
        return Tls(ca, certificate, key, server_name)
    except ValueError as error:
        raise typer.BadParameter(f"SLORA_CERTIFICATE, SLORA_CERTIFICATE_KEY: {error}") from None


def api_key() -> str:
    """The caller's key, or an operator's token for a store, from SLORA_API_KEY: an option would show it to everyone on
    this host."""
    return os.environ.get("SLORA_API_KEY", "")


def admin_key() -> str:
    """The gateway's admin key, from SLORA_ADMIN_KEY. Raises ValueError without one."""
    key = os.environ.get("SLORA_ADMIN_KEY", "")
    if not key:
        raise ValueError("set SLORA_ADMIN_KEY to the gateway's admin key")
    return key


def generation_options(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    max_tokens: int | None,
    stop: list[str] | None,
    priority: int | None,
) -> GenerationOptions:
    """These options as the client takes them."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop or None,
        "priority": priority,
    }
