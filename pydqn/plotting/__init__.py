"""Pictures: learning curves, value functions, videos and pages of episodes."""
