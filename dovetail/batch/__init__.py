"""From samples to rows to micro-batches."""
