"""From `tc` to `rngd`: where every value lives and which passes and transfers compute it.

`tensor.py` is the maths of placed values, `emitter.py` writes instructions, `vector.py` turns expressions into vector
chains, `contract.py` maps contractions (two stationarities), `attention.py` and `indexed.py` do what their names say,
`function.py` walks a function,
`entry.py` and `block.py` add what the entry and repeated layers need. Entry: `lower(module, machine, options)`.
"""

from backend_rngd.lowering.lower import lower
from backend_rngd.lowering.program import Lowered, LoweringOptions, Placement, Port

__all__ = ["Lowered", "LoweringOptions", "Placement", "Port", "lower"]
