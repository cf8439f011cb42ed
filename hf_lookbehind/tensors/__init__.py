"""Tensors and what holds them, without any algorithm: norms, names, copies, replays, processes."""
