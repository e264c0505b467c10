"""Sweeps of sparse transcoders: train a grid of cells on one activation stream, evaluate, record."""
