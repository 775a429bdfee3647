"""Measurements, each a script: speed, memory, gradient variance, and a rehearsal of the real models with random weights."""
