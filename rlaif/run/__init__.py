"""The run directory: journals (the truth), manifest, lock, and the tables derived from them."""
