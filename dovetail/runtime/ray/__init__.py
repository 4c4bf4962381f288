"""Trainer ranks and engines as processes on Ray. Nothing outside this folder imports ray."""
