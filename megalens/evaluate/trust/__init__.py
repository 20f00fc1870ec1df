"""Can the words be trusted? Figures with controls, intervals and lines drawn beforehand. None may choose or train a lens."""
