"""A plan's real step run under fake tensors: no GPU, no memory, any model transformers has."""
