"""Settings: the models of rlaif.toml, how they are loaded, and which may change when a run is resumed."""
