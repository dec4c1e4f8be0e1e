"""Environments that step together, and what an env_id names."""
