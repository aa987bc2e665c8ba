"""The gateway: routes requests to engines."""
