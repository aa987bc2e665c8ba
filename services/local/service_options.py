"""What services are told, read before anything slow is done: they would refuse it for the same reasons, but later."""

from __future__ import annotations

from collections.abc import Mapping

from services.adapter_store.arena import check_arena
from services.adapter_store.config import AdapterStoreSettings
from services.common.settings import check_settings
from services.engine.config import EngineSettings
from services.gateway.config import GatewaySettings
from services.local.checkpoint import BadInput

_Options = Mapping[str, object]
_UNKNOWN_YET = "-"
"""For what a service must be told and `LocalStack` will tell it."""


def check_options(store: _Options, engine: _Options, gateway: _Options, environ: Mapping[str, str]) -> None:
    """Raises BadInput for an option that a service would refuse, or an arena that this machine has no room for."""
    program = "engine"
    try:
        peers = {"adapter_store": _UNKNOWN_YET}
        check_settings(EngineSettings, program, {"checkpoint": _UNKNOWN_YET, **peers, **engine}, environ)
        program = "gateway"
        check_settings(GatewaySettings, program, {"engines": _UNKNOWN_YET, **peers, **gateway}, environ)
        program = "adapter-store"
        told = {"base_model_config": _UNKNOWN_YET, **store}
        settings = check_settings(AdapterStoreSettings, program, told, environ)
        check_arena(settings.arena_bytes, settings.arena_dir)
    except ValueError as error:
        raise BadInput(f"{program}: {error}") from error
