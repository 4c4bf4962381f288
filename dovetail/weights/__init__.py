"""New weights to engines: when, and in which order."""
