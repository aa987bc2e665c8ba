"""The `slora` command. It needs typer and rich (`pip install slora[command]`); the client itself does not."""
