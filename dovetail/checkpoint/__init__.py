"""What survives a run: atomic verified checkpoints, Hugging Face directories, random states."""
