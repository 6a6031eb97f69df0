"""An OpenAI-compatible server: `app` speaks HTTP, `asked` reads requests, `batcher` runs them.

`server` listens and `pictures` opens files, for the chat page too.
"""
