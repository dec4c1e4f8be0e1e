"""Learning curves, value functions, and recordings of episodes."""
