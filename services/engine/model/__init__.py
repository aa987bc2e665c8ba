"""The base model: configuration, checkpoint, decoder."""
