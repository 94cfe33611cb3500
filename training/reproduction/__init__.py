"""The paper's numbers, one by one, and the evaluations that give them again: python -m training.reproduce."""
