"""What is kept in files, and what of the source code decides a result."""
