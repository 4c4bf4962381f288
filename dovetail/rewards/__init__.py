"""What a response is worth: built-in rules, remote judges, the user's function; their faults."""
