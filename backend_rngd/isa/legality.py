"""Whether descriptors and streams keep the documented limits: `check` for one descriptor, `check_stream` for a program,
`check_pipeline` for a program that is cut into stages.

Not limited here: the number of VRF operands of a pass (the book speaks of one register-file port chosen by tag guards,
the lowering uses one operand an ALU) and the tag stage, which the descriptors do not have.
"""

from __future__ import annotations

from backend_rngd.isa.check_one import check
from backend_rngd.isa.check_pipeline import check_pipeline
from backend_rngd.isa.check_stream import BufferSpan, check_stream, errors
from backend_rngd.isa.rules import RULES, Violation

__all__ = ["RULES", "BufferSpan", "Violation", "check", "check_pipeline", "check_stream", "errors"]
