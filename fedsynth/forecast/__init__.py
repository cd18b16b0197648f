"""What a planned run will spend, send, hold and take: `fedsynth check`."""
