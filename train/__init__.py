"""The run: recipe, schedules, loop, checkpoints, evaluation and export."""
