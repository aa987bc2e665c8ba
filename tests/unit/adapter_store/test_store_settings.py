"""What a store tells of itself where it was not told."""

from __future__ import annotations

import socket

import pytest

from services.adapter_store.config import AdapterStoreSettings


@pytest.mark.parametrize(
    ("listen", "advertise", "address"),
    [
        ("127.0.0.1:0", "", "127.0.0.1:7"),
        ("0.0.0.0:50052", "", f"{socket.gethostname()}:7"),
        ("[::]:50052", "", f"{socket.gethostname()}:7"),
        ("[::1]:50052", "", "[::1]:7"),
        ("0.0.0.0:50052", "store", "store:7"),
        ("0.0.0.0:50052", "store:443", "store:443"),
        ("0.0.0.0:50052", "10.0.0.3", "10.0.0.3:7"),
        ("0.0.0.0:50052", "fd00::3", "[fd00::3]:7"),
        ("0.0.0.0:50052", "[fd00::3]:443", "[fd00::3]:443"),
    ],
)
def test_where_others_reach_it(listen: str, advertise: str, address: str) -> None:
    settings = AdapterStoreSettings("checkpoint", listen=listen, advertise=advertise)
    assert settings.address_at(7) == address


@pytest.mark.parametrize("name", ["replica_seconds", "num_homes"])
def test_numbers_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AdapterStoreSettings("checkpoint", **{name: 0})
