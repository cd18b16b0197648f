"""The machine around a run: folders that only their owner reads, traffic that stays on the machine."""
