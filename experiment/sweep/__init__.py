"""Many settings: plans, searches, workers."""
