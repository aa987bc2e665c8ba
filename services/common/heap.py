"""Python's garbage collector, and what it need not look at.

A full collection walks everything that is alive, and nothing else of the process runs meanwhile: some 80 ms with all
that a service imports. What was made at the start stays until the end.
"""

from __future__ import annotations

import gc


def settle() -> None:
    """To be called at the end of a start: what is alive now is never looked at again, what is dead is freed."""
    gc.collect()
    gc.freeze()
