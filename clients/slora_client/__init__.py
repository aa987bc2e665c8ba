"""A Python client of slora.

    with SloraClient("localhost:50051") as client:
        print(client.generate("my-adapter", "Hello", max_tokens=20).text)

It needs grpcio and protobuf (with googleapis-common-protos), nothing else.
"""

from slora_client.adapter_client import AdapterClient
from slora_client.admin_client import AdminClient
from slora_client.async_adapter_client import AsyncAdapterClient
from slora_client.async_client import AsyncSloraClient
from slora_client.errors import SloraRequestError
from slora_client.options import GenerationOptions
from slora_client.sync_client import SloraClient
from slora_client.tls import Tls
from slora_client.values import (
    Adapter,
    AdapterFit,
    ChatMessage,
    Chunk,
    FinishReason,
    Generation,
    Key,
    Model,
    ModuleWidths,
    Problem,
    Prompt,
    SyncRefusal,
    SyncReport,
    Tenant,
    TokenLogprob,
    TopLogprob,
    Usage,
    Validation,
)

__all__ = [
    "Adapter",
    "AdapterClient",
    "AdapterFit",
    "AdminClient",
    "AsyncAdapterClient",
    "AsyncSloraClient",
    "ChatMessage",
    "Chunk",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "Key",
    "Model",
    "ModuleWidths",
    "Problem",
    "Prompt",
    "SloraClient",
    "SloraRequestError",
    "SyncRefusal",
    "SyncReport",
    "Tenant",
    "Tls",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "Validation",
]
