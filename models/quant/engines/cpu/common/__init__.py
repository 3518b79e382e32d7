"""What several ways share: where columns stand, which rows are active, buffers, counts, what becomes of a sum."""
