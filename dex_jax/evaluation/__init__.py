"""Comparing outputs, and what a run needs."""
