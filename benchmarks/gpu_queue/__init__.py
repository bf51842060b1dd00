"""The queue of `python benchmarks/gpu.py`: its steps, the processes they run in, and what one call leaves for the next."""
