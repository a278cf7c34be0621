"""CPU kernels called by XLA, and what a process sets up before it computes: allocator and compilation cache."""
