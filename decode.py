"""Decode text with Depth Exploration Decoding; `python decode.py --help` says how."""

import sys

from dex_jax.cli.decode import main

if __name__ == "__main__":
    sys.exit(main())
