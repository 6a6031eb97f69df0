"""Pictures and videos as arrays, on the host, and the encoders that read them."""
