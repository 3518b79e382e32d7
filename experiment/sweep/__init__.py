"""Many settings: lists of work, searches, workers."""
