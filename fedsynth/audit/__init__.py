"""Audits: mechanisms and runs tried against their own statements, on canaries and records of charges alone."""
