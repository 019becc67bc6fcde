"""The command-line programs; the scripts at the top of the repository only call them."""
