"""Reports of runs: one HTML page, one JSON file and one Parquet table of every figure on the page."""
