"""Trains a small NaViL from scratch: data, model, training, evaluation and publishing (recipes/README.md)."""
