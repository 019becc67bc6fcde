"""What is measured, compared and planned."""
