"""Reinforcement learning: completions for trainers, written by an engine on the model that they train."""

from __future__ import annotations

from .rollouts import rollout_func

__all__ = ["rollout_func"]
