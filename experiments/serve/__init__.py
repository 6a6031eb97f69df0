"""An OpenAI-compatible server: `app` speaks HTTP, `asked` reads requests, `batcher` runs them."""
