"""Learning-rate schedules: pure functions of the step, so nothing of them is ever saved."""

from hmde_dist.recipe import OptimizerSection


def learning_rate(settings: OptimizerSection, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then linear to zero or constant."""
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.schedule == "constant":
        return settings.learning_rate * warm
    left = (steps - step) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * min(warm, left)
