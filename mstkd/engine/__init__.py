"""The training engine: loop, DeepSpeed backend, checkpoints, distributed start, stop signals."""
