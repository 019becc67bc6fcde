"""The page that sets the claims of the paper beside what was measured."""
