"""What passes between the processes of a run, and what becomes of it when one of them dies."""
