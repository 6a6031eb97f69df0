"""A family of published weights: SmolLM2-135M-Instruct and DINOv2-S, from packages."""
