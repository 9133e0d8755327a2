"""Servers that speak OpenAI's protocol: requests, responses, and what their failures mean."""
