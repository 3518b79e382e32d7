"""What an array is and what it computes: the hardware's fields, cells, how a weight lies on them, and the ADC."""
