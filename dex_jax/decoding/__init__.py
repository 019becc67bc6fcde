"""Decoding methods: the loop, AR, and generate()."""
