"""`slora models`, `slora generate`, `slora chat` and `slora bench`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from slora_client.command.bench import Load, Outcome, run_load
from slora_client.command.bench_progress import shown_progress
from slora_client.command.bench_report import report_of, table_of
from slora_client.command.conversation import Conversation
from slora_client.command.options import (
    DEFAULT_GATEWAY,
    GatewayOption,
    JsonOption,
    MaxTokensOption,
    PriorityOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    api_key,
    generation_options,
    tls,
)
from slora_client.command.outcome import console
from slora_client.command.terminal import speaker
from slora_client.sync_client import SloraClient
from slora_client.values import ChatMessage, Model, Prompt

app = typer.Typer()

ModelArgument = Annotated[str, typer.Argument(help="the base model, an adapter, or name@version")]
SystemOption = Annotated[str | None, typer.Option(help="a system message that comes first")]


@app.command()
def models(gateway: GatewayOption = DEFAULT_GATEWAY, as_json: JsonOption = False) -> None:
    """List the base model and the adapters."""
    with SloraClient(gateway, api_key(), tls()) as client:
        found = client.list_models(timeout=30)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(model) for model in found], default=str, indent=2))
        return
    table = Table("model", "version", "rank", "registered", "engines that hold it", box=None)
    for model in found:
        table.add_row(*_row(model))
    console().print(table)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="what to continue; `-` reads it from standard input")],
    gateway: GatewayOption = DEFAULT_GATEWAY,
    chat: Annotated[bool, typer.Option("--chat", help="as a user's message, by the model's chat template")] = False,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    priority: PriorityOption = None,
) -> None:
    """Generate from a prompt and print the text as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    asked: Prompt = text
    if chat or system is not None:
        asked = [*_opening(system), ChatMessage("user", text)]
    options = generation_options(temperature, top_p, top_k, seed, max_tokens, stop, priority)
    with speaker(gateway, api_key(), tls()) as speaking:
        speaking.say(model, asked, options, [])
    if sys.stdout.isatty():
        sys.stdout.write("\n")


@app.command()
def chat(
    model: ModelArgument,
    gateway: GatewayOption = DEFAULT_GATEWAY,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    priority: PriorityOption = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; `/clear` begins anew; Ctrl-D, or Ctrl-C at the prompt, leaves.

    Exits with 1 if lines come from a pipe and one of them was not answered.
    """
    with speaker(gateway, api_key(), tls()) as speaking:
        options = generation_options(temperature, top_p, top_k, seed, max_tokens, stop, priority)
        conversation = Conversation(speaking, model, _opening(system), options)
        conversation.run()
    if conversation.has_failed and not sys.stdin.isatty():
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[list[str], typer.Argument(help="models to ask in turn")],
    gateway: GatewayOption = DEFAULT_GATEWAY,
    num_requests: Annotated[int, typer.Option("--requests", min=1, help="requests in all")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at a time: one ends, the next begins")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt, drawn at random")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="tokens of each answer, whatever it says")] = 64,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Put a closed-loop load on a gateway and measure throughput and latencies. Exits with 1 if a request failed.

    How far it is goes to stderr.
    """
    load = Load(tuple(model), num_requests, concurrency, prompt_tokens, output_tokens, seed)
    outcomes, seconds = asyncio.run(_run_shown(gateway, load))
    report = report_of(outcomes, seconds)
    if as_json:
        typer.echo(json.dumps({"load": dataclasses.asdict(load), **dataclasses.asdict(report)}, indent=2))
    else:
        console().print(table_of(report))
        for message in report.messages.values():
            typer.echo(f"slora: {message}", err=True)
    if report.errors:
        raise typer.Exit(1)


async def _run_shown(gateway: str, load: Load) -> tuple[list[Outcome], float]:
    async with shown_progress(load.num_requests) as on_outcome:
        return await run_load(gateway, api_key(), load, tls(), on_outcome)


def _opening(system: str | None) -> list[ChatMessage]:
    return [] if system is None else [ChatMessage("system", system)]


def _row(model: Model) -> tuple[str, ...]:
    created = model.create_time.strftime("%Y-%m-%d %H:%M") if model.create_time else ""
    version = model.adapter_id.rpartition("@")[2] if model.adapter_id else "base"
    return model.name, version, str(model.rank or ""), created, str(model.num_resident_engines)
