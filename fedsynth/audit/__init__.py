"""Audits: mechanisms and runs tried against their own statements, on canaries and records of charges alone."""

FILE = "audit.json"  # in a run's directory: its report has a section then
