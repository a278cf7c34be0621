"""CPU kernels called by XLA, and the process-wide setup of the memory allocator and the compilation cache."""
