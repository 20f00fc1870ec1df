"""One file per make of models that differs from Llama; each registers itself and needs no mention elsewhere."""
