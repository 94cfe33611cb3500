"""The features that tasks are given: cached, live, or from pairs."""
