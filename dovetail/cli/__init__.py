"""The command line: what a person types, and the errors a person reads."""
