"""API keys, and what a gateway remembers of them."""

from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import Reason, SloraError
from services.tenancy import authentication
from services.tenancy.api_keys import ApiKey, make_key, presented_key
from services.tenancy.authentication import KeyHolders
from services.tenancy.tenants import Tenant


class Directory:
    """Keys in memory, which counts look-ups."""

    def __init__(self, *keys: ApiKey) -> None:
        self.keys = {key.key_id: key.digest for key in keys}
        self.num_asked = 0
        self.is_away = False

    async def find_key(self, key_id: str) -> tuple[str, Tenant] | None:
        self.num_asked += 1
        if self.is_away:
            raise SloraError(Reason.TENANCY_UNAVAILABLE, "away")
        return (self.keys[key_id], Tenant(f"owner of {key_id}")) if key_id in self.keys else None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def holders(directory: Any, clock: Clock, fail_open: bool = False) -> tuple[KeyHolders, list[str]]:
    refusals: list[str] = []
    return KeyHolders(directory, 5.0, fail_open, refusals.append, clock), refusals


def header(key: ApiKey) -> list[str]:
    return [f"Bearer {key.text}"]


def test_keys_differ_carry_256_bits_and_hide_their_secret() -> None:
    keys = [make_key() for _ in range(50)]
    assert len({key.secret for key in keys}) == len({key.key_id for key in keys}) == 50
    for key in keys:
        assert len(key.secret) == 43  # 256 bits, six a character
        assert presented_key(header(key)) == key
        assert key.secret not in repr(key)
        assert key.matches(key.digest)
        assert not key.matches(make_key().digest)


async def test_a_key_is_believed_for_its_seconds_and_no_longer() -> None:
    key, clock = make_key(), Clock()
    directory = Directory(key)
    known, refusals = holders(directory, clock)
    for _ in range(3):
        assert (await known.authenticate(header(key))).name == f"owner of {key.key_id}"
    assert directory.num_asked == 1
    directory.keys.clear()
    clock.now = 4.9
    await known.authenticate(header(key))
    clock.now = 5.0
    with pytest.raises(SloraError) as refused:
        await known.authenticate(header(key))
    assert refused.value.reason is Reason.API_KEY_INVALID
    assert refusals == ["api_key_invalid"]


async def test_made_up_keys_are_not_remembered_and_push_out_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "_MAX_CACHED_KEYS", 2)
    real = [make_key() for _ in range(3)]
    directory = Directory(*real)
    known, _ = holders(directory, Clock())
    for key in real[:2]:
        await known.authenticate(header(key))
    for _ in range(10):
        with pytest.raises(SloraError):
            await known.authenticate(header(make_key()))
    asked = directory.num_asked
    for key in real[:2]:
        await known.authenticate(header(key))
    assert directory.num_asked == asked
    await known.authenticate(header(real[2]))  # pushes out the one that was used longest ago
    await known.authenticate(header(real[1]))
    assert directory.num_asked == asked + 1
    await known.authenticate(header(real[0]))
    assert directory.num_asked == asked + 2


@pytest.mark.parametrize("fail_open", [False, True])
async def test_with_redis_away_only_who_is_told_to_goes_on_believing(fail_open: bool) -> None:
    key, clock = make_key(), Clock()
    directory = Directory(key)
    known, _ = holders(directory, clock, fail_open)
    await known.authenticate(header(key))
    directory.is_away = True
    await known.authenticate(header(key))
    clock.now = 100.0
    if fail_open:
        await known.authenticate(header(key))
        with pytest.raises(SloraError):
            await known.authenticate(header(ApiKey(key.key_id, make_key().secret)))
    else:
        with pytest.raises(SloraError) as refused:
            await known.authenticate(header(key))
        assert refused.value.reason is Reason.TENANCY_UNAVAILABLE
