"""Helpers that every other package may use."""
