"""A run's folder: configuration, metrics, checkpoints, and the lock that keeps other processes out."""
