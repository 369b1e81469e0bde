"""Rewards: a score for each completion, from a network or a judge."""
