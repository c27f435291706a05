"""The chip: machine description, instruction set, mapping, layouts, placement, scheduling, emission and the artifact."""
