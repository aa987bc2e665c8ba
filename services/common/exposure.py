"""Who can reach an address: this host only, or others too."""

from __future__ import annotations

import ipaddress
import logging

logger = logging.getLogger(__name__)


def is_loopback(address: str) -> bool:
    """Whether `host:port` (or a Unix socket) is reached from this host only; a name other than localhost is not."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warn_of_plain_text(option: str, address: str) -> None:
    """Says in the log that others on the network can read, and change, what is sent to `address`."""
    if not is_loopback(address):
        logger.warning(
            "%s %s: plain text: whoever is on the way reads prompts, answers, weights and keys; give --tls-certificate "
            "and --tls-key, unless the network encrypts",
            option,
            address,
        )
