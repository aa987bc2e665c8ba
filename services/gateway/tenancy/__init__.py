"""Who calls, what they may use, and how much: API keys, tenants and limits, kept in Redis."""
