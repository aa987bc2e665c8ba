"""The services of slora. A service never imports another one: they meet in the generated protos only."""
