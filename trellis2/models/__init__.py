"""The networks. They return tensors and do not import each other."""
