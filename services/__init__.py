"""The services of slora. A service never imports another one: they meet in the generated protos only."""

import os

# grpc reads it when it is imported. Its own lines are no JSON, and whoever knocks at a TLS port in plain text, or with
# a wrong certificate, makes one. To see why handshakes fail, set it to INFO.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
