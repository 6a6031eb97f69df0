"""What an LLM knows of plain language: texts from packages, questions of fact, instructions."""
