"""A Python client of slora."""
