"""`python -m services.local demo | up | down | seed`: slora on one host."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.local.checkpoint import BadInput
from services.local.child_process import StartFailed
from services.local.narrator import Narrator
from services.local.stack import PATIENT_THREADS, SLEEPING_THREADS
from services.local.up import GATEWAY_PORT, HTTP_PORT, UpRequest, run_down, run_up

STATE_DIR = Path(".slora")
OUT_DIR = Path("out")
HIGHEST_PORT = 65_535
BAD_INPUT = 2
INTERRUPTED = 130
_OPTIONS_OF = (
    ("engine", "engine", "device=cuda"),
    ("gateway", "gateway", "http_allow_adapter_updates=true"),
    ("store", "adapter_store", "sync_uri=s3://bucket/prefix/"),
)
"""Each service as `up` names it, its module, and a setting that it has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 well, 1 failed, 2 bad input."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    narrator = Narrator()
    try:
        code: int = arguments.run(arguments, narrator)
    except BadInput as error:
        print(f"slora: {error}", file=sys.stderr)
        return BAD_INPUT
    except StartFailed as error:
        if error.exit_code == BAD_INPUT and error.last_words:
            # The service refused what it was given, such as a model of an unknown kind, and said why.
            print(f"slora: {error.last_words}", file=sys.stderr)
            return BAD_INPUT
        print(f"slora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        narrator.line("stopped")
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.local", description="slora on one host")
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help="where data, logs and caches live")
    commands = parser.add_subparsers(required=True, metavar="demo | up | down | seed")
    demo = commands.add_parser("demo", help="the whole path on this machine; ends by itself")
    demo.add_argument("--out", type=Path, default=OUT_DIR, help="where the picture goes")
    demo.set_defaults(run=_demo)
    up = commands.add_parser("up", help="keep it running; without a checkpoint, the demo's model and adapters")
    up.add_argument("--checkpoint", type=Path, help="directory of a Hugging Face checkpoint")
    up.add_argument("--adapters", help="a directory with an adapter in each subdirectory, or s3://bucket/prefix")
    up.add_argument("--port", type=int, default=GATEWAY_PORT, help="the gateway's port (default %(default)s)")
    up.add_argument("--http-port", type=int, default=HTTP_PORT, help="its port for HTTP (default %(default)s)")
    up.add_argument("--engines", type=int, default=1, help="how many engines (default %(default)s)")
    for service, module, example in _OPTIONS_OF:
        up.add_argument(
            f"--{service}-option",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"a setting of the {service}, such as {example}; see `python -m services.{module} --help`",
        )
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="stop what `up` started; does nothing if nothing runs")
    down.set_defaults(run=lambda arguments, narrator: run_down(arguments.state_dir, narrator))
    seed = commands.add_parser("seed", help="the demo's model and adapters, for services that run elsewhere")
    seed.add_argument("--materials", type=Path, required=True, help="directory that becomes the demo's checkpoint")
    seed.add_argument("--store", default="", help="host:port of an adapter store to register the adapters in")
    seed.add_argument("--own-checkpoint", default="", help="a checkpoint that is served instead: then nothing is done")
    seed.set_defaults(run=_seed)
    return parser


def _seed(arguments: argparse.Namespace, narrator: Narrator) -> int:
    if arguments.own_checkpoint:
        narrator.line(f"{arguments.own_checkpoint} is served, not the demo's model")
        return 0
    _prepare_libraries(SLEEPING_THREADS)
    from services.local.demo.seed import seed

    return seed(arguments.materials, arguments.store, narrator)


def _demo(arguments: argparse.Namespace, narrator: Narrator) -> int:
    _prepare_libraries()
    from services.local.demo.run import run_demo

    return run_demo(arguments.state_dir, arguments.out, narrator)


def _up(arguments: argparse.Namespace, narrator: Narrator) -> int:
    _prepare_libraries()
    options = {service: _options(arguments, service) for service, _, _ in _OPTIONS_OF}
    if any("base_model" in given for given in options.values()):
        raise BadInput(
            "the base model's name is that of its checkpoint's directory, for all services; link to it by another"
        )
    if arguments.engines < 1:
        raise BadInput(f"--engines {arguments.engines}: at least one is needed")
    for option, port in (("--port", arguments.port), ("--http-port", arguments.http_port)):
        if not 0 <= port <= HIGHEST_PORT:
            raise BadInput(f"{option} {port}: a port is a number up to {HIGHEST_PORT}, and 0 takes a free one")
    request = UpRequest(
        arguments.state_dir,
        arguments.checkpoint,
        arguments.adapters,
        arguments.port,
        arguments.engines,
        options["engine"],
        http_port=arguments.http_port,
        gateway_options=options["gateway"],
        store_options=options["store"],
    )
    return run_up(request, narrator)


def _options(arguments: argparse.Namespace, service: str) -> dict[str, str]:
    found = {}
    for option in getattr(arguments, f"{service}_option"):
        name, separator, value = option.partition("=")
        if not (name and separator):
            raise BadInput(f"--{service}-option {option} is not NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


def _prepare_libraries(threads: Mapping[str, str] = PATIENT_THREADS) -> None:
    """Sets what torch and transformers read when they are imported; `threads` is how those of a product wait."""
    quiet = {
        # Nothing here needs anything from a model hub.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # Its own notes on connections that a restarted service has closed; what matters comes as a status.
        "GRPC_VERBOSITY": "ERROR",
    }
    for key, value in {**quiet, **threads}.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|huggingface_hub)\b")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
