"""What is run from the repository alone: `python -m studies.templates` and `python -m studies.reproduction`."""
