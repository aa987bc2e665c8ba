"""`up` keeps slora running for a checkpoint and adapters that the user names; `down` stops it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.local.adapter_sources import AdapterSource, bring_adapters, count_others, find_adapters
from services.local.checkpoint import BadInput, makes_weights_up, open_checkpoint
from services.local.narrator import Narrator
from services.local.pid_file import claimed, stop_running
from services.local.ports import claiming
from services.local.s3_client import S3Place, named_endpoint
from services.local.service_options import check_options
from services.local.stack import LocalStack, Options, check_gateway_ports

GATEWAY_PORT = 50051
HTTP_PORT = 8000
STORE_PORT = 50052
"""Where `slora adapters` looks by itself."""
STOP_SECONDS = 60.0
START_SECONDS = 3600.0
"""For each service. Weights may come from a slow disk; one that ends is noticed at once, and Ctrl-C ends the wait."""
_NAP_SECONDS = 1.0
_BUCKET = "adapters"
_MOST_REFUSALS_SHOWN = 10


@dataclass(frozen=True)
class UpRequest:
    """What the user asked for; without a checkpoint the demo's model is served, with its adapters."""

    state_dir: Path
    checkpoint: Path | None = None
    adapters: str | None = None
    gateway_port: int = GATEWAY_PORT
    num_engines: int = 1
    engine_options: Options | None = None
    http_port: int = HTTP_PORT
    gateway_options: Options = field(default_factory=dict)
    store_options: Options = field(default_factory=dict)


def run_up(request: UpRequest, narrator: Narrator) -> int:
    """Serves until it is interrupted (Ctrl-C, SIGTERM or `down`); then 0."""
    with claimed(_pid_path(request.state_dir)), claiming() as claim:
        # All this before the demo's model is made, which takes a while; another `up` may be at the same point.
        check_gateway_ports(request.gateway_port, request.http_port, claim)
        store_port = _store_port(claim, request.gateway_port, request.http_port)
        engine_options = request.engine_options or {}
        check_options(request.store_options, engine_options, request.gateway_options, os.environ)
        try:
            _serve(request, store_port, narrator)
        except KeyboardInterrupt:
            narrator.line("stopped")
    return 0


def run_down(state_dir: Path, narrator: Narrator) -> int:
    """Stops what `run_up` started with the same state directory; 0 also if nothing runs."""
    pid = stop_running(_pid_path(state_dir), STOP_SECONDS)
    narrator.line("nothing is running" if pid is None else f"stopped (process {pid})")
    return 0


def _serve(request: UpRequest, store_port: int, narrator: Narrator) -> None:
    checkpoint, sources, example_prompt = _what_to_serve(request, narrator)
    in_s3 = next((source.s3_place for source in sources if source.s3_place is not None), None)
    stack = LocalStack(
        request.state_dir / "up" / _state_name(checkpoint, in_s3),
        checkpoint,
        num_engines=request.num_engines,
        gateway_port=request.gateway_port,
        http_port=request.http_port,
        store_port=store_port,
        bucket=in_s3.bucket if in_s3 else _BUCKET,
        # What is uploaded while it runs goes beside the adapters that the user has there.
        store_options={**({"s3_prefix": f"{in_s3.prefix}slora-uploads"} if in_s3 else {}), **request.store_options},
        engine_options=request.engine_options or {},
        gateway_options=request.gateway_options,
        s3_environment={} if in_s3 else None,
        start_timeout_seconds=START_SECONDS,
        report=narrator.line,
    )
    try:
        with narrator.task("Starting", total=len(stack.process_names)) as task:
            stack.start(lambda name: task.advance(1, name))
            task.note = ", ".join(stack.process_names)
        taken = [name for source in sources for name in _bring(source, stack, narrator)]
        num_kept = count_others(stack.store_address, taken)
        if num_kept:
            narrator.line(f"{num_kept} more adapters are served from before, kept in {_short(stack.state_dir)}")
        narrator.line(how_to_call(stack, taken[0] if taken else stack.base_model, example_prompt))
        while True:
            # Not signal.pause(): it would sleep through a signal that comes just before it.
            time.sleep(_NAP_SECONDS)
    finally:
        with narrator.task("Stopping", total=1):
            stack.stop()


def _what_to_serve(request: UpRequest, narrator: Narrator) -> tuple[Path, list[AdapterSource], str]:
    """The checkpoint, where its adapters are, and a prompt that suits it."""
    if request.checkpoint is not None:
        open_checkpoint(request.checkpoint, needs_weights=not makes_weights_up(request.engine_options or {}))
        sources = [find_adapters(request.adapters, os.environ)] if request.adapters else []
        return request.checkpoint, sources, "Once upon a time"
    if request.adapters is not None:
        raise BadInput("adapters need the checkpoint that they were trained on: CHECKPOINT=dir")
    # Imported only here: a user's own model needs nothing of what the demo trains with.
    from services.local.demo.corpus import SHOWN_QUESTIONS, prompt_of
    from services.local.demo.materials import obtain_materials

    materials = obtain_materials(request.state_dir / "demo-cache", narrator)
    manners, scale = materials.manners, materials.random_adapters
    return materials.checkpoint, [AdapterSource(manners, {}), AdapterSource(scale, {})], prompt_of(SHOWN_QUESTIONS[0])


def _bring(source: AdapterSource, stack: LocalStack, narrator: Narrator) -> list[str]:
    """The names of those that were taken."""
    refusals: list[str] = []
    taken: list[str] = []
    with narrator.task("Adapters", total=len(source.names)) as task:

        def done(name: str, refusal: str) -> None:
            if refusal:
                refusals.append(f"  refused: {name}: {refusal}")
            else:
                taken.append(name)
            task.advance(1, name)

        bring_adapters(source, stack.store_address, done)
        task.note = f"{len(taken)} served" + (f", {len(refusals)} refused" if refusals else "")
    for refusal in refusals[:_MOST_REFUSALS_SHOWN]:
        narrator.line(refusal)
    return taken


def how_to_call(stack: LocalStack, model: str, prompt: str) -> str:
    """What to tell the user: where everything is and how to call it."""
    services = {
        "gateway": stack.gateway_address,
        "gateway over HTTP": stack.http_url,
        "adapter store": stack.store_address,
        **dict(zip(stack.engine_names, stack.engine_addresses, strict=True)),
        "redis": stack.redis.url,
        **{f"metrics of {name}": url for name, url in stack.metrics_urls.items()},
        "logs": str(stack.log_dir),
        "what is kept": _short(stack.state_dir),
    }
    width = max(map(len, services))
    addresses = "\n".join(f"  {name:<{width}}  {address}" for name, address in services.items())
    request = {"model": model, "prompt": {"text": prompt}}
    body = json.dumps({**request, "sampling": {"temperature": 0}, "stopping": {"max_tokens": 40}})
    completion = json.dumps({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 40})
    activate = Path(sys.executable).parent / "activate"
    tools = (
        f"The client, slora and buf are here: source {shlex.quote(_short(activate))}\n\n" if activate.is_file() else ""
    )
    return f"""
slora serves {stack.base_model}:

{addresses}

{tools}Its adapters:

  slora adapters ls --store {stack.store_address}

From Python:

  from slora_client import AdapterClient, SloraClient

  with SloraClient("{stack.gateway_address}") as client:
      print(client.generate("{model}", {json.dumps(prompt)}, temperature=0, max_tokens=40).text)
      print([entry.name for entry in client.list_models()])
  with AdapterClient("{stack.store_address}") as store:
      store.upload("my-adapter", "directory/of/a/peft/adapter")

From a shell:

  buf curl --protocol grpc --http2-prior-knowledge -d {shlex.quote(body)} \\
    http://{stack.gateway_address}/slora.gateway.v1.InferenceService/Generate

As OpenAI's API (any client of it, with this base URL and any key):

  curl {stack.http_url}/completions -H 'Content-Type: application/json' \\
    -d {shlex.quote(completion)}

Ctrl-C or `make down` stops it.
"""


def _store_port(claim: Callable[[int], bool], *taken: int) -> int:
    """The port at which the store is looked for; 0, any free one, where somebody else has it or is about to."""
    return STORE_PORT if STORE_PORT not in taken and claim(STORE_PORT) else 0


def _short(path: Path) -> str:
    """`path` as it is copied most easily: from here, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path)


def _state_name(checkpoint: Path, in_s3: S3Place | None) -> str:
    """Tells apart what must not share a catalogue: checkpoints, also of one name, and where adapters' files are."""
    place = checkpoint.resolve()
    named = [str(place)] + ([in_s3.uri, named_endpoint(os.environ) or ""] if in_s3 else [])
    digest = hashlib.sha256("\n".join(named).encode() + (place / "config.json").read_bytes()).hexdigest()
    return f"{place.name}-{digest[:12]}"


def _pid_path(state_dir: Path) -> Path:
    return state_dir / "up.pid"
