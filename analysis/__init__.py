"""A Trace or Answers in, arrays, tables and figures out. Knows nothing about pages and never loads a model."""
