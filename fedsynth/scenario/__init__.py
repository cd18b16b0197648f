"""One experiment as data: its schema, its TOML, the page of its keys."""
