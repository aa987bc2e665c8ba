"""Free TCP ports of the loopback interface that stay free while their owner restarts, or until it starts."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LOWEST_PORT = 10_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a predecessor that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def claiming() -> Iterator[Callable[[int], bool]]:
    """Gives a function that claims a port: False if it is in use, or claimed by another process; else nobody else who
    asks here gets it while inside.

    Between the look at a port and the start of its server lies the start of all others. A claim is a name that the
    kernel takes back when its owner dies; like a port it counts in this network alone.
    """
    with contextlib.ExitStack() as held:

        def claim(port: int) -> bool:
            name = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                name.bind(f"\0slora-port-{port}")
            except OSError:
                return False
            return is_free(port)

        yield claim


def free_port(taken: Iterable[int] = ()) -> int:
    """A free port that is not in `taken`, below those the kernel hands out by itself.

    A port of the kernel's own range could be given to some outgoing connection while its server restarts; a client
    that retries it could even be connected to itself. Raises OSError when no port is free.
    """
    excluded = set(taken)
    highest = _lowest_ephemeral_port()
    for port in random.sample(range(_LOWEST_PORT, highest), k=min(2_000, highest - _LOWEST_PORT)):
        if port not in excluded and is_free(port):
            return port
    raise OSError(f"no free port between {_LOWEST_PORT} and {highest}")


def _lowest_ephemeral_port() -> int:
    try:
        lowest = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
    # A host that hands out nearly every port leaves no room below; then its range has to do.
    return lowest if lowest >= _LOWEST_PORT + 1_000 else 32_768
