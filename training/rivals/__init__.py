"""Other methods against position and outliers, beside ours in one table: python -m training.rivals."""
