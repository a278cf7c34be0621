"""Training: the loop that feeds the learner, what is attached to it, and what several hosts tell each other."""
