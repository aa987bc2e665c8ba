"""A Python client of slora: generate through the gateway, administer adapters at the adapter store.

from slora_client import SloraClient

with SloraClient("127.0.0.1:50051") as client:
    print(client.generate("pirate", "Where is the harbour?", temperature=0, max_tokens=32).text)
"""

from slora_client.adapter_client import AdapterClient, AdapterVersion
from slora_client.async_client import AsyncSloraClient
from slora_client.errors import SloraRequestError
from slora_client.generation import Generation, GenerationChunk, ModelEntry, TokenLogprob, Usage
from slora_client.sync_client import SloraClient

__all__ = [
    "AdapterClient",
    "AdapterVersion",
    "AsyncSloraClient",
    "Generation",
    "GenerationChunk",
    "ModelEntry",
    "SloraClient",
    "SloraRequestError",
    "TokenLogprob",
    "Usage",
]
