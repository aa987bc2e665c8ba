"""A gateway that asks for no keys is for its own host: it refuses to listen elsewhere unless it is told to."""

from __future__ import annotations

from services.common.exposure import is_loopback
from services.common.settings import AddressError
from services.gateway.config import GatewaySettings


def check_exposure(settings: GatewaySettings) -> None:
    """Raises AddressError if strangers could use the gateway and nobody said that they may."""
    if settings.tenancy_redis or settings.allow_anonymous:
        return
    for option, address in (("--listen", settings.listen), ("--http", settings.http)):
        if address and not is_loopback(address):
            raise AddressError(
                f"{option} {address}: without API keys a gateway listens on the loopback interface only, for whoever "
                "reaches it may use every adapter. Give --tenancy-redis redis://… to ask for keys, an address such as "
                "127.0.0.1:50051, or --allow-anonymous true if the network keeps strangers out"
            )
