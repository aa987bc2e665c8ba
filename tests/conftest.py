"""Fixtures for every test: real Redis and S3 servers, as processes of their own."""

pytest_plugins = ["tests.fixtures.embedded_servers"]
