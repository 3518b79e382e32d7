"""What is kept in files, and digests of the source code."""
