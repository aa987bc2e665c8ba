"""A store that asks nobody who calls is for its own host: it refuses to listen elsewhere unless it is told to."""

from __future__ import annotations

from services.adapter_store.config import AdapterStoreSettings
from services.common.exposure import is_loopback
from services.common.settings import AddressError


def check_exposure(settings: AdapterStoreSettings) -> None:
    """Raises AddressError if strangers could change adapters and nobody said that they may."""
    if settings.service_tokens or settings.tls_client_ca or settings.allow_anonymous or is_loopback(settings.listen):
        return
    raise AddressError(
        f"--listen {settings.listen}: a store that asks nobody who calls listens on the loopback interface only, for "
        "whoever reaches it may read, replace and delete every adapter. Give --service-tokens to ask for tokens, "
        "--tls-client-ca to ask for certificates, an address such as 127.0.0.1:50052, or --allow-anonymous true if the "
        "network keeps strangers out"
    )
