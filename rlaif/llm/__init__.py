"""Requests to models: clients and endpoints, retries, the executor and the batch API, usage and cost."""
