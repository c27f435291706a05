"""Simulator of RNGD instruction streams: values (`functional`), time (`timing`), traces and the runtime on top.

Knows memories, addresses and instructions only; it never imports the compiler's IR or a framework.
"""
