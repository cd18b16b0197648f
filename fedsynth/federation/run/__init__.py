"""The files of a run: log, directory, tables, privacy report and checkpoint."""
