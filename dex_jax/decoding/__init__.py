"""The decoding methods: the loop of DEX, AR, and generate()."""
