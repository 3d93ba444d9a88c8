"""An OpenAI-compatible server over the engine (extra `serve`)."""
