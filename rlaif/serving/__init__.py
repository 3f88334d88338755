"""Model servers that rlaif runs: vLLM as a child process, its precision and CPU cores, and replicas on Ray."""
