"""Checkpoint files: read tensor by tensor, written whole or not at all, hashed and checked."""
