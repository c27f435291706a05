"""Rewrites of `tc` modules, one pass a file; `registry` names them, `pipeline` lists the stages, `opt` runs them."""
