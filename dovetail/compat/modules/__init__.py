"""Modules that are foreign ones: names of ours under the addresses that plugins import."""
