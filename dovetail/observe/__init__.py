"""What a person can see of a run: its directory, metrics, progress, plots, samples and log."""
