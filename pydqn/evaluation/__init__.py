"""Playing with trained weights: policies, episodes, scores."""
