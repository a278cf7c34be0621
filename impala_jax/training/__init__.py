"""Training: the loop around the learner, its hooks, and the communication between hosts."""
