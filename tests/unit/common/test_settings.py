"""Settings from command line, environment and defaults, and what is said of bad ones."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

import pytest

from services.adapter_store.config import AdapterStoreSettings
from services.common.settings import (
    AddressError,
    LogLevel,
    check_bounds,
    check_peers,
    parse_settings,
    setting,
    warn_of_unknown_variables,
)
from services.engine.config import EngineSettings
from services.gateway.config import GatewaySettings


@dataclass(frozen=True)
class Example:
    """An example."""

    name: str = setting(help="required")
    count: int = setting(3, "a number")
    share: float | None = setting(None, "optional")
    loud: bool = setting(False, "yes or no")
    parts: tuple[str, ...] = setting((), "a list")
    log_level: LogLevel = setting("INFO", "one of several")


def test_defaults_environment_and_command_line_in_that_order() -> None:
    environ = {"SLORA_MY_PROGRAM_COUNT": "5", "SLORA_MY_PROGRAM_LOUD": "true", "SLORA_MY_PROGRAM_PARTS": "a, b"}
    parsed = parse_settings(Example, "my-program", ["--name", "x", "--count", "7", "--log-level", "debug"], environ)
    assert parsed == Example("x", 7, None, True, ("a", "b"), "DEBUG")


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ([], {}, "required: --name"),
        (["--name", "x", "--count", "many"], {}, "--count: invalid int value: 'many'"),
        (["--name", "x", "--loud", "perhaps"], {}, "'perhaps' is neither true nor false"),
        (["--name", "x", "--log-level", "LOUD"], {}, "'LOUD' is none of DEBUG, INFO, WARNING, ERROR"),
        (["--name", "x"], {"SLORA_P_COUNT": "x"}, "environment variable SLORA_P_COUNT: invalid literal"),
        (["--name", "x", "--coun", "3"], {}, "unrecognized arguments"),
    ],
)
def test_bad_settings_end_with_a_usage_message(
    arguments: list[str], environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings(Example, "p", arguments, environ)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_variables_that_are_no_settings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    environ = {
        "SLORA_MY_PROGRAM_COUNT": "5", "SLORA_MY_PROGRAM_COUMT": "5", "SLORA_MY_PROGRAM_QZ": "",
        "SLORA_MY_PROGRAM_KEY": "", "SLORA_OTHER_COUNT": "5", "SLORA_MY_PROGRAM": "localhost:1",
        "SLORA_MY_PROGRAM_PORT": "tcp://10.0.0.1:80", "SLORA_MY_PROGRAM_PORT_80_TCP_ADDR": "10.0.0.1",
        "SLORA_MY_PROGRAM_SERVICE_HOST": "10.0.0.1", "SLORA_MY_PROGRAM_SERVICE_PORT_GRPC": "80",
    }  # fmt: skip
    warn_of_unknown_variables(Example, "my-program", environ, "SLORA_MY_PROGRAM_KEY")
    assert caplog.messages == [
        "no setting has the variable SLORA_MY_PROGRAM_COUMT; is it SLORA_MY_PROGRAM_COUNT?",
        "no setting has the variable SLORA_MY_PROGRAM_QZ",
    ]


def test_peers_are_given_by_host_and_port() -> None:
    check_peers("--engines", ["localhost:1", "10.0.0.1:65535", "[::1]:50051", "dns:///engines:50051", "unix:/run/x"])


@pytest.mark.parametrize(
    "address",
    ["localhost", "", ":50051", "host:", "host:0", "host:65536", "host:https", "::1", "a:b:1", "[::1]", "h:²"],
)
def test_what_is_no_peer_is_refused(address: str) -> None:
    with pytest.raises(AddressError, match=r"--engines .*: a peer is given as host:port"):
        check_peers("--engines", ["localhost:50051", address])


@dataclass(frozen=True)
class Bounded:
    """Two numbers."""

    seconds: float = setting(1.0, "how long", above=0)
    count: int = setting(0, "how many; 0: any", at_least=0)
    share: float = setting(0.5, "of what there is", at_least=0, below=1)
    ratio: float = setting(1.0, "of what there is", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seconds", "0", "seconds is 0.0; it must be above 0"),
        ("--seconds", "nan", "seconds is nan; it must be a finite number"),
        ("--seconds", "inf", "seconds is inf; it must be a finite number"),
        ("--seconds", "1e10", "seconds is 10000000000.0; it must be at most 1000000000"),
        ("--ratio", "1.5", "ratio is 1.5; it must be at most 1"),
        ("--count", "-1", "count is -1; it must be at least 0"),
        ("--share", "1", "share is 1.0; it must be below 1"),
    ],
)
def test_numbers_out_of_bounds_are_named(option: str, value: str, message: str) -> None:
    assert parse_settings(Bounded, "p", ["--seconds", "0.5", "--count", "0"], {}) == Bounded(0.5, 0)
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_settings(Bounded, "p", [option, value], {})


@pytest.mark.parametrize("settings", [AdapterStoreSettings, EngineSettings, GatewaySettings])
def test_every_number_has_a_bound(settings: type) -> None:
    """No service takes a negative time or size and behaves oddly later."""
    hints = typing.get_type_hints(settings)
    numbers = [field for field in dataclasses.fields(settings) if hints[field.name] in (int, float)]
    checked_elsewhere = {
        "tp_size", "arena_bytes", "disk_cache_bytes",
    }  # fmt: skip
    assert len(numbers) > 10
    unbounded = {f.name for f in numbers if f.metadata["at_least"] is None and f.metadata["above"] is None}
    assert unbounded <= checked_elsewhere, unbounded - checked_elsewhere
