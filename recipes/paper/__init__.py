"""The paper's three stages of training, for a model made by `convert_checkpoint.py from-llm` (recipes/README.md)."""
