"""The `slora` command: adapters administered from a shell. Needs typer and rich: `pip install 'slora[command]'`."""
