"""What a run will need before it begins: memory from the real step on tensors without data, time, sessions, disk."""
