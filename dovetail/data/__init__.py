"""Where prompts come from: data files, chat templates, order, and the buffer of what came back."""
