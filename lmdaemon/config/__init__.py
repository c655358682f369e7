"""Reads config.toml, checks it, and makes frozen settings of it. Import its modules by their own names."""
