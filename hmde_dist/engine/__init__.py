"""Losses -> weights: the DeepSpeed engine, schedules, checkpoints, the journal and the meter."""
