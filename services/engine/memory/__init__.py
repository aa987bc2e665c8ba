"""The unified pool of pages for KV and adapter weights."""
