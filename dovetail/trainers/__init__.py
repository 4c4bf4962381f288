"""Trainers: rows in, changed weights and metrics out."""
