"""Serving Yuan 2.0: a model worker that speaks FastChat's protocol and an OpenAI-compatible API server."""
