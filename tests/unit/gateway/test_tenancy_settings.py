"""Who may reach a gateway, and where its admin key comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.exposure import is_loopback
from services.gateway.config import GatewaySettings
from services.gateway.tenancy.admin_key_source import read_admin_key
from services.tenancy.tenants import Tenant

KEY = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/slora.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        (":1", False),
        ("10.0.0.1:1", False),
        ("gateway.example:1", False),
        ("127.0.0.1.example:1", False),
    ],
)
def test_what_is_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected


def settings_of(**fields: str) -> GatewaySettings:
    return GatewaySettings(("engine:1",), ("store:1",), **{"tenancy_redis": "redis://x", **fields})  # type: ignore[arg-type]


def test_the_admin_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_admin_key(settings_of(), {}) == ""
    assert read_admin_key(settings_of(), {"SLORA_GATEWAY_ADMIN_KEY": KEY}) == KEY
    assert read_admin_key(settings_of(admin_key_file=str(file)), {}) == KEY


@pytest.mark.parametrize("content", ["", "short", "ä" * 40, "a b" * 20])
def test_an_admin_key_that_can_be_guessed_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(ValueError, match="openssl") as refused:
        read_admin_key(settings_of(admin_key_file=str(file)), {})
    assert not content or content not in str(refused.value)


def test_an_admin_key_without_tenants_or_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tenancy-redis"):
        read_admin_key(settings_of(tenancy_redis=""), {"SLORA_GATEWAY_ADMIN_KEY": KEY})
    with pytest.raises(ValueError, match="nowhere"):
        read_admin_key(settings_of(admin_key_file=str(tmp_path / "nowhere")), {})


def test_patterns_are_of_whole_names() -> None:
    tenant = Tenant("t", adapters=("team-*", "cook"))
    allowed = [name for name in ("team-", "team-a", "xteam-a", "cook", "cooks", "Cook", "") if tenant.may_use(name)]
    assert allowed == ["team-", "team-a", "cook"]
