"""The transformer: layers, layouts, exit heads."""
