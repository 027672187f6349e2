"""The HTTP server: OpenAI's routes on Starlette, with msgspec schemas, in front of the engine process."""
