"""Which sequences run in a step, and with what memory. No tensors here."""
