"""The engine's core process: the step loop that owns the device."""
