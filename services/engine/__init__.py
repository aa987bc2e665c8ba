"""The engine: batches requests for different adapters over one base model."""
