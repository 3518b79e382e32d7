"""From flags to a network on crossbars and its images."""
