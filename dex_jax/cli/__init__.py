"""The command-line programs; the scripts at the top of the repository only call them."""

import os

# For each program read from disk, XLA writes pages of errors on CPUs with AVX-512, where nothing is wrong (jax issue
# 38445). It asks for this once, when JAX is imported; what fails raises an exception all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
