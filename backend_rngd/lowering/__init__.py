"""From `tc` to `rngd`: where every value lives and which passes and transfers compute it.

`tensor.py` is the maths of placed values, `emitter.py` writes instructions, `vector.py` turns expressions into vector
chains, `contract.py` maps contractions (two stationarities), `attention.py` and `indexed.py` do what their names say,
and `lower.py` walks the functions. Entry: `lower(module, machine, options)`.
"""

from backend_rngd.lowering.lower import LoweringOptions, Lowered, lower

__all__ = ["Lowered", "LoweringOptions", "lower"]
