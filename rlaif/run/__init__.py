"""The run directory: journals (the source of truth), manifest, lock, and the tables derived from the journals."""
