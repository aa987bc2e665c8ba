"""Tenants and their API keys, for the services that ask who calls. No service of its own."""
