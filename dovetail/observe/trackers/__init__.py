"""Where metrics go: one file per tracker, one row each in `dovetail.observe.tracker`."""
