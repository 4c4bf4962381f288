"""The fixtures of every example's test."""

from tests.examples.example_run import run_example, task

__all__ = ["run_example", "task"]
