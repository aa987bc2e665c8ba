"""The adapter store: takes adapters from S3, holds them in host RAM, streams them to engines."""
