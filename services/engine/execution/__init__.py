"""Runs a planned step on the device: batch tensors, forward pass, sampling."""
