"""The walk over one `tc` function: an environment of placed values and one method per operation.

`function_base.py`: the walk, views and element-wise operations; `function_rows.py`: these over tokens in HBM;
`function_pieces.py`: these of few tokens, in pieces on the slices; `function_contract.py`: contractions;
`function_indexed.py`: gathers, caches, attention; `function_units.py`: what happens between units.
"""

from __future__ import annotations

from backend_rngd.lowering.function_contract import Contractions
from backend_rngd.lowering.function_indexed import Indexed
from backend_rngd.lowering.function_pieces import InPieces
from backend_rngd.lowering.function_rows import RowWise
from backend_rngd.lowering.function_units import BetweenUnits


class FunctionLowering(Contractions, Indexed, BetweenUnits, RowWise, InPieces):
    """Common part of the entry and of block functions."""
