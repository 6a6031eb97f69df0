"""An OpenAI-compatible server: `app` speaks HTTP, `request` reads requests, `batcher` runs them.

`server` listens and `pictures` opens files, for the chat page too.
"""
