"""The chip: machine description, instruction set, lowering, placement, scheduling, emission and the artifact."""
