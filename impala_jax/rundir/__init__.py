"""The folder of a run: configuration, metrics, checkpoints, and a lock against other processes."""
