"""The planner: what a token costs with each method on a machine, predicted."""
