"""What is run from the repository alone: `python -m studies.bench`."""
