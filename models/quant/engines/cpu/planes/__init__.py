"""Ideal cells: bit planes, counts of ones, and the ADC in forms that vectors take."""
