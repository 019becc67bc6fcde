"""The planner's page: what the paper's cases come to, and what compilers say of them."""
