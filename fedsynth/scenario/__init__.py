"""One experiment as data: its schema, its TOML, and the page of its keys."""
