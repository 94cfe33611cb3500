"""The tasks by the protocols of the authors' repository (--protocol repository): modules as those of tasks/."""
