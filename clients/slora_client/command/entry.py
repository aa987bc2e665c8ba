"""Where the `slora` command begins; says what to install where its libraries are missing."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Runs the command."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"slora: {' and '.join(missing)} is missing: pip install 'slora[command]'\n")
        raise SystemExit(2)
    # Only here: the client itself needs neither.
    from slora_client.command import main as command

    command.main()


if __name__ == "__main__":
    main()
