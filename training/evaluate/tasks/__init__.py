"""One module a task; each is found by its file's name, and all have the shape that runner.py describes."""
