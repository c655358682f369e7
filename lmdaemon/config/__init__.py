"""config.toml: read, checked, and as frozen settings. Each room is imported by its own name."""
