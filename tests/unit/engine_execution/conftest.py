from __future__ import annotations

from tests.fixtures.interpreter import hurry

hurry()
