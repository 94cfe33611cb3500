"""The data sets, one file each, and how annotations are read."""
