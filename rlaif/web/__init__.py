"""What web pages share: Markdown that is safe to show, and the security middleware."""
