"""The walk over one `tc` function: an environment of placed values and one method per operation.

`function_base.py`: the walk, views and element-wise operations; `function_rows.py`: these over tokens in HBM;
`function_contract.py`: contractions; `function_indexed.py`: gathers, caches, attention; `function_units.py`: what
happens between units.
"""

from __future__ import annotations

from backend_rngd.lowering.function_contract import Contractions
from backend_rngd.lowering.function_indexed import Indexed
from backend_rngd.lowering.function_rows import RowWise
from backend_rngd.lowering.function_units import BetweenUnits


class FunctionLowering(Contractions, Indexed, BetweenUnits, RowWise):
    """Common part of the entry and of block functions."""
