"""Trained policies: loading them, playing episodes, evaluation under published protocols."""
