"""The lab: the paper's experiments at a size that anyone can rerun. Knows nothing about figures or pages."""
