"""Agents, masks, processing, losses, rewards, evaluation, traces."""

from __future__ import annotations

from dovetail.compat.row import Alias

ALIASES: tuple[Alias, ...] = ()
