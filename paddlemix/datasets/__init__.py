"""Rows of data files -> samples -> sequences -> batches; import from the modules, which are light where they can be."""
