"""Shared by web pages: Markdown as safe HTML, and the security middleware."""
