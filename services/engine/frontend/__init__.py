"""The engine's asyncio process: gRPC, tokenizer, streams. Speaks to the core by messages."""
