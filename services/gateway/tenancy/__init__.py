"""What callers may use, and how much: keys and tenants of `services.tenancy`, and limits, kept in the same Redis."""
