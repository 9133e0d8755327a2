"""A client of OpenAI-compatible servers: requests, responses and errors."""
