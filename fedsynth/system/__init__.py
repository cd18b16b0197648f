"""The machine around a run: folders that only their owner can read, traffic that stays on the machine."""
