"""A directory for the end of `sys.path`: see `dovetail.compat.finder`."""
