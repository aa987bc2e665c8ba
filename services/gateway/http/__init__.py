"""The OpenAI-compatible HTTP API: another way to say the same requests. It decides nothing that gRPC does not."""
