"""From a Hugging Face model to `tc`: resolution, capture with torch.export, the ATen table, weight references.

Importing this package imports neither torch nor transformers; `frontend.capture` does.
"""
