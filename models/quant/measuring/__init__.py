"""Measuring networks on crossbars: settings, their chips, and what accuracy is left. Reads no flags and touches no files."""
