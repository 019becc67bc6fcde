"""Teacher forcing: what exits say along texts that are known, and what follows from it without running a loop."""
