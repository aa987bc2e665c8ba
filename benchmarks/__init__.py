"""Measurements, one file a claim; results lie in benchmarks/results."""
