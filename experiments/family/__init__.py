"""A small trained family for the demo: scenes, a base LLM, two encoders, all made on a CPU."""
