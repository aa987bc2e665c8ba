"""All of slora on one host, supervised: `make demo` and `make up`."""
