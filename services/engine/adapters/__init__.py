"""Adapters inside an engine: their layout in pages, their life, their loading."""
