"""A whole run: build its parts, turn the loop, report."""
