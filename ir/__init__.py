"""What is computed: the `tc` dialect, its maths without xDSL (axes, expressions), reference kernels, interpreter, text."""
