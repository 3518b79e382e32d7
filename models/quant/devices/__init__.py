"""What real cells and real wires do to an array."""
