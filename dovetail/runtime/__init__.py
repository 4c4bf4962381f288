"""Who lives in which process on which devices."""
