"""The process and the machine that it runs on: signals, process trees, surroundings."""
