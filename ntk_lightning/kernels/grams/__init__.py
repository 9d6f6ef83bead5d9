"""Gram matrices of any kernel: on disk, by several processes, by name."""
