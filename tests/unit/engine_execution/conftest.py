from __future__ import annotations

from tests.fixtures.interpreter import hurry, shuffle_programs

hurry()
shuffle_programs()
