"""What is computed: the `tc` dialect, its maths without xDSL, reference kernels, the interpreter, the text form."""
