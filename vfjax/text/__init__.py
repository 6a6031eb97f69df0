"""Prompts and conversations as token ids, and answers as text."""
