"""Train, export and evaluate exit heads; `python train_exits.py --help` says how."""

import sys

from dex_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
