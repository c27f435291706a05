"""Machine description: every hardware parameter with its source, and the closed forms of engine time.

Imports only numpy and pydantic, so that the simulator and the runtime can use it without the compiler.
"""

from backend_rngd.machine.description import Machine, Mode, Parameter, load_machine

__all__ = ["Machine", "Mode", "Parameter", "load_machine"]
