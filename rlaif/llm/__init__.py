"""Talking to models: client, managed vLLM server, tokens and dollars, and the one door that requests go through."""
