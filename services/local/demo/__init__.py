"""What `make demo` shows: a tiny model and its adapters, served, compared, reported."""
