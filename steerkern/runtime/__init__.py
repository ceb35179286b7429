"""From a model to a steered model: finding sites, mapping rows, attaching and detaching."""
