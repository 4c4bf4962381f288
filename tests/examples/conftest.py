"""The fixtures of every example's test."""

from tests.examples.example_run import engine, run_example, task

__all__ = ["engine", "run_example", "task"]
