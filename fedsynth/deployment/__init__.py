"""Real sites and their coordinator: keys, policies, invitations, programs."""
