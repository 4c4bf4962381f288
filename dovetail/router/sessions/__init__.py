"""Conversations of agents, recorded token by token: a tree of turns, its routes, its samples."""
