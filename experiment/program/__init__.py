"""How a program runs: its flags' machinery, its processes, its machine, its errors."""
