"""Settings: frozen dataclasses filled from the command line, then the environment, then their defaults.

A field `max_running: int = setting(64, "most sequences that run at once")` of the engine is `--max-running` on the
command line and `SLORA_ENGINE_MAX_RUNNING` in the environment. A field without default is required.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT|SERVICE_PORT_\w+|PORT|PORT_\d+_(TCP|UDP)\w*)$")

MOST_SECONDS = 10**9
"""Thirty years: threads wait no longer than ten times that."""

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


LogLevel = typing.Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = typing.Literal["json", "text"]


class UnusableSettingsError(Exception):
    """With these settings a service cannot start; the message says what is wrong."""


class AddressError(UnusableSettingsError):
    """An address of the settings cannot be served on, or called; the message says which and why."""


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    only_with: str = "",
) -> Any:
    """A dataclass field with its help text; without a default the setting is required. Bounds: see `check_bounds`.

    only_with: the value of another setting without which this one means nothing; its help begins with it.
    """
    bounds = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    text = f"{only_with}: {help}" if only_with else help
    return dataclasses.field(default=default, metadata={"help": text, "only_with": only_with, **bounds})


def check_bounds(settings: Any) -> None:
    """Raises ValueError for a number of these settings that is not within what its field says, or is not finite.

    What is a number of seconds is at most `MOST_SECONDS`. For `__post_init__`.
    """
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata
        least, above, below, most = (bounds.get(name) for name in ("at_least", "above", "below", "at_most"))
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} is {value}; it must be a finite number")
        if field.name.endswith("seconds") and value is not None:
            most = MOST_SECONDS
        # Asked this way round: no number is none of it.
        if least is not None and not value >= least:
            raise ValueError(f"{field.name} is {value}; it must be at least {least}")
        if above is not None and not value > above:
            raise ValueError(f"{field.name} is {value}; it must be above {above}")
        if below is not None and not value < below:
            raise ValueError(f"{field.name} is {value}; it must be below {below}")
        if most is not None and not value <= most:
            raise ValueError(f"{field.name} is {value}; it must be at most {most}")


def parse_settings(
    cls: type[T], program: str, argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> T:
    """Fills `cls` for `program` (such as `engine`); ends the process with a usage message on bad input."""
    parser = argparse.ArgumentParser(prog=program, description=cls.__doc__, allow_abbrev=False)
    return _parse(parser, cls, program, argv, os.environ if environ is None else environ)


def check_settings(cls: type[T], program: str, options: Mapping[str, object], environ: Mapping[str, str]) -> T:
    """What `program` will make of `options` (by name) and its environment; ValueError says what it would."""
    argv = [part for name, value in options.items() for part in (option_name(name), str(value))]
    return _parse(_RaisingParser(add_help=False, allow_abbrev=False), cls, program, argv, environ)


def warn_of_unknown_variables(cls: type, program: str, environ: Mapping[str, str], *known: str) -> None:
    """Logs which variables look like settings of `program` and are none, with what they may have been meant for.

    They may be another version's, so they are no error. `known` are read elsewhere. What Kubernetes and Docker say of a
    service by the same name is left out.
    """
    prefix = variable_name(program, "")
    ours = [field.name.upper() for field in dataclasses.fields(cls)] + [name.removeprefix(prefix) for name in known]
    for name in sorted(environ):
        rest = name.removeprefix(prefix)
        if rest == name or rest in ours or _SERVICE_LINK.search(name):
            continue
        (meant,) = difflib.get_close_matches(rest, ours, 1) or ("",)
        logger.warning("no setting has the variable %s%s", name, f"; is it {prefix}{meant}?" if meant else "")


def variable_name(program: str, name: str) -> str:
    """How the setting `name` of `program` is called in the environment."""
    return f"SLORA_{program}_{name}".replace("-", "_").upper()


def option_name(name: str) -> str:
    """How the setting `name` is called on the command line."""
    return f"--{name.replace('_', '-')}"


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def _parse(
    parser: argparse.ArgumentParser, cls: type[T], program: str, argv: Sequence[str] | None, environ: Mapping[str, str]
) -> T:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, program, field, hints[field.name], environ)
    return cls(**vars(parser.parse_args(argv)))


_GRPC_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")


def check_peers(option: str, addresses: Iterable[str]) -> None:
    """Raises AddressError unless each is `host:port`, or a target by one of gRPC's schemes (`unix:…`, `dns:///…`)."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        is_host = bool(host) and "/" not in host and (":" not in host or (host.startswith("[") and host.endswith("]")))
        is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
        if not (is_host and is_port) and not address.startswith(_GRPC_SCHEMES):
            raise AddressError(f"{option} {address}: a peer is given as host:port, such as localhost:50052")


def _add_argument(
    parser: argparse.ArgumentParser,
    program: str,
    field: dataclasses.Field[Any],
    hint: Any,
    environ: Mapping[str, str],
) -> None:
    variable = variable_name(program, field.name)
    convert = _converter(hint)
    default = field.default
    required = default is dataclasses.MISSING
    if variable in environ:
        try:
            default, required = convert(environ[variable]), False
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"environment variable {variable}: {error}")
    described = field.metadata.get("help", "")
    shown = "" if required or default in (None, "", ()) else f" (default {default})"
    parser.add_argument(
        option_name(field.name),
        type=convert,
        default=None if required else default,
        required=required,
        metavar=field.name.upper(),
        help=f"{described}{shown} [{variable}]".replace("%", "%%"),
    )


def _converter(hint: Any) -> Any:
    arguments = [a for a in typing.get_args(hint) if a is not types.NoneType]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = arguments[0]
    if hint is bool:
        return _parse_bool
    if typing.get_origin(hint) is typing.Literal:
        return lambda text: _parse_choice(text, typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = _converter(typing.get_args(hint)[0])
        return lambda text: tuple(item(part.strip()) for part in text.split(",") if part.strip())
    return hint


def _parse_choice(text: str, choices: Sequence[str]) -> str:
    chosen = {choice.lower(): choice for choice in choices}.get(text.lower())
    if chosen is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
    return chosen


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
