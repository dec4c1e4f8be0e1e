"""Networks, losses, optimizers, and the learner that puts them together."""
