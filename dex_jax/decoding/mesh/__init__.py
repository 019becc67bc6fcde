"""Decoding on a mesh of devices."""
