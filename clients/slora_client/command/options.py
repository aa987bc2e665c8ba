"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from slora_client.options import GenerationOptions

GatewayOption = Annotated[str, typer.Option("--gateway", envvar="SLORA_GATEWAY", help="host:port of the gateway")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy; default 1")]
TopPOption = Annotated[float | None, typer.Option(help="keep the likeliest tokens that sum to this")]
TopKOption = Annotated[int | None, typer.Option(help="keep the k likeliest tokens; 0 keeps all")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="makes sampling reproducible")]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="at most so many new tokens; default: as many as fit")]
StopOption = Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]

DEFAULT_GATEWAY = "localhost:50051"


def generation_options(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    max_tokens: int | None,
    stop: list[str] | None,
) -> GenerationOptions:
    """These options as the client takes them."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop or None,
    }
