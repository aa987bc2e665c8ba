"""Settings from command line, environment and defaults, and what is said of bad ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.common.settings import AddressError, LogLevel, check_peers, parse_settings, setting


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


def test_peers_are_given_by_host_and_port() -> None:
    check_peers("--engines", ["localhost:1", "10.0.0.1:65535", "[::1]:50051", "dns:///engines:50051", "unix:/run/x"])


@pytest.mark.parametrize(
    "address",
    ["localhost", "", ":50051", "host:", "host:0", "host:65536", "host:https", "::1", "a:b:1", "[::1]", "h:²"],
)
def test_what_is_no_peer_is_refused(address: str) -> None:
    with pytest.raises(AddressError, match=r"--engines .*: a peer is given as host:port"):
        check_peers("--engines", ["localhost:50051", address])
