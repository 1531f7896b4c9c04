"""Latency and memory of models and exported files, side by side: each in a process of its own, in turns."""
