"""The embedded engine: generation in this process, on the tensors that the trainer updates."""
