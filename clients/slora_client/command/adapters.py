"""`slora adapters …`: one function a command."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from slora_client.adapter_client import AdapterClient
from slora_client.codec import Progress as OnProgress
from slora_client.command.options import api_key, tls
from slora_client.command.outcome import REFUSED, console, explained, write_json
from slora_client.command.tables import adapter_details, adapters_table, sync_summary, validation_summary
from slora_client.values import Adapter

app = typer.Typer(no_args_is_help=True, help="The adapters of an adapter store.")

Store = Annotated[
    str, typer.Option(envvar="SLORA_ADAPTER_STORE", metavar="HOST:PORT", help="The adapter store's address.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table; errors too, on stderr.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a call may take.")]
Tenant = Annotated[str, typer.Option(help="Whose it is.")]
AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="name, name@version or name@alias.")]
DEFAULT_STORE = "localhost:50052"


@app.command()
def push(
    source: Annotated[str, typer.Argument(help="A directory that PEFT saved, or s3://bucket/prefix/ to register.")],
    name: Annotated[str, typer.Argument(help="Its name. Default: the directory's.")] = "",
    tenant: Tenant = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; may be repeated.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="An alias to set to it; may be repeated.")] = None,
    pin: Annotated[bool, typer.Option(help="Keep it in the store's memory.")] = False,
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter directory, or register one that lies in S3: a new version, unless the name has the content."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        labels, _ = _labels(label or [], removable=False)
        name = name or _default_name(source)
        if source.startswith("s3://"):
            pushed = client.register(name, source, tenant=tenant, labels=labels, timeout=timeout)
        else:
            with _progress(f"uploading {name}") as on_progress:
                pushed = client.upload(
                    name, source, tenant=tenant, labels=labels, on_progress=on_progress, timeout=timeout
                )
        is_new = pushed.is_new
        # Content that was there before keeps what it has besides.
        if not labels.items() <= pushed.labels.items():
            pushed = client.update(pushed.adapter_id, set_labels=labels, timeout=timeout)
        for each in alias or []:
            pushed = client.set_alias(pushed.adapter_id, each, timeout=timeout)
        if pin:
            pushed = client.update(pushed.adapter_id, pinned=True, timeout=timeout)
        if not as_json:
            console().print(
                f"{pushed.adapter_id} " + ("is new" if is_new else "had this content already: not a new version")
            )
            if not is_new and (newest := client.get(name, timeout=timeout).adapter_id) != pushed.adapter_id:
                console().print(f"{name} goes on meaning {newest}: ask for {pushed.adapter_id}, or set an alias to it")
        _show(dataclasses.replace(pushed, is_new=is_new), as_json)


@app.command()
def ls(
    prefix: Annotated[str, typer.Argument(help="Only names that begin with this.")] = "",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """List adapters, every version."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        found = client.list(name_prefix=prefix, tenant=tenant, timeout=timeout)
        if as_json:
            write_json(found)
        elif found:
            console().print(adapters_table(found))
        else:
            console(stderr=True).print("no adapters" + (f" whose names begin with {prefix}" if prefix else ""))


@app.command()
def show(adapter_id: AdapterId, store: Store = DEFAULT_STORE, timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """Show everything about one version."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        _show(client.get(adapter_id, timeout=timeout), as_json)


@app.command()
def alias(
    adapter_id: AdapterId,
    alias: Annotated[str, typer.Argument(help="The alias, such as prod.")],
    expect: Annotated[
        int | None, typer.Option(help="Only if it means this version now; 0: only if it means none.")
    ] = None,
    remove: Annotated[bool, typer.Option(help="Remove it; ADAPTER is then the bare name.")] = False,
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Make an alias mean a version, in one step: `alias pirate@3 prod` (of a bare name the newest)."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        if remove:
            changed = client.delete_alias(adapter_id, alias, expected=expect, timeout=timeout)
        else:
            meant = client.get(adapter_id, timeout=timeout)
            changed = client.set_alias(meant.adapter_id, alias, expected=expect, timeout=timeout)
        _say(changed, as_json, f"{changed.name}@{alias} " + ("is removed" if remove else f"means {changed.adapter_id}"))


@app.command()
def label(
    adapter_id: AdapterId,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE|KEY-", help="Labels to set, or to remove.")],
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Set and remove labels of a version."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        labels, removed = _labels(changes, removable=True)
        _show(client.update(adapter_id, set_labels=labels, remove_labels=removed, timeout=timeout), as_json)


@app.command()
def pin(adapter_id: AdapterId, store: Store = DEFAULT_STORE, timeout: Timeout = 120.0, as_json: AsJson = False) -> None:
    """Keep a version in the memory of the stores, from now on and from their start."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        pinned = client.update(adapter_id, pinned=True, timeout=timeout)
        _say(pinned, as_json, f"{pinned.adapter_id} is pinned")


@app.command()
def unpin(
    adapter_id: AdapterId, store: Store = DEFAULT_STORE, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """Let a version be evicted again."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        unpinned = client.update(adapter_id, pinned=False, timeout=timeout)
        _say(unpinned, as_json, f"{unpinned.adapter_id} is not pinned")


@app.command()
def rm(
    adapter_id: Annotated[str, typer.Argument(metavar="ADAPTER", help="name@version, or a name with --all.")],
    every: Annotated[bool, typer.Option("--all", help="Every version of a bare name, and its aliases.")] = False,
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Delete a version. Requests that run end as they began; files that were registered or synced stay in S3."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        if "@" not in adapter_id and not every:
            versions = [
                entry for entry in client.list(name_prefix=adapter_id, timeout=timeout) if entry.name == adapter_id
            ]
            if len(versions) > 1:
                named = ", ".join(entry.adapter_id for entry in versions)
                raise ValueError(f"{adapter_id} has {len(versions)} versions ({named}): name one, or give --all")
        count = client.delete(adapter_id, timeout=timeout)
        if as_json:
            write_json({"adapter_id": adapter_id, "num_deleted": count})
        else:
            console().print(f"deleted {adapter_id}" + (f", {count} versions" if count > 1 else ""))


@app.command()
def sync(
    source_uri: Annotated[str, typer.Argument(help="s3://bucket/prefix/. Default: what the store syncs itself.")] = "",
    tenant: Tenant = "",
    allow_empty: Annotated[bool, typer.Option(help="Remove all adapters of a prefix that is empty now.")] = False,
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Find what is new, changed and gone under a prefix in S3, a folder an adapter."""
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        report = client.sync(source_uri, tenant=tenant, allow_empty=allow_empty, timeout=timeout)
        if as_json:
            write_json(report)
        else:
            console().print(sync_summary(report))


@app.command()
def validate(
    directory: Annotated[Path, typer.Argument(help="A directory that PEFT saved.")],
    store: Store = DEFAULT_STORE,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Say whether the store could serve an adapter, what is wrong with it, and which base model it fits.

    Exit status 1 if it could not. Nothing is kept.
    """
    with explained(as_json), AdapterClient(store, api_key(), tls()) as client:
        with _progress("checking") as on_progress:
            found = client.validate(directory, on_progress=on_progress, timeout=timeout)
        if as_json:
            write_json(found)
        else:
            console().print(validation_summary(found))
    if not found.is_valid:
        raise typer.Exit(REFUSED)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[OnProgress]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        write_json(adapter)
    else:
        console().print(adapter_details(adapter))


def _say(adapter: Adapter, as_json: bool, sentence: str) -> None:
    if as_json:
        write_json(adapter)
    else:
        console().print(sentence)


def _default_name(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2] if source.startswith("s3://") else Path(source).resolve().name
    if not name:
        raise ValueError(f"{source} has no name of its own; give one")
    return name


def _labels(given: list[str], removable: bool) -> tuple[dict[str, str], list[str]]:
    """`key=value` to set; where that is allowed, `key-` to remove."""
    labels, removed = {}, []
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key:
            labels[key] = value
        elif removable and text.endswith("-") and len(text) > 1:
            removed.append(text[:-1])
        else:
            raise ValueError(f"{text!r} is no label: give KEY=VALUE" + (", or KEY- to remove one" if removable else ""))
    return labels, removed
