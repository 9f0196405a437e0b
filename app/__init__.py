"""What people touch: the command line and the page. Knows models and analysis only by their plain functions."""
