"""The benchmark: methods on the same prompts, and the page that compares them."""
