"""``python -m megalens.config`` prints conf/config.yaml."""

from megalens.config.printing import documented_yaml

print(documented_yaml(), end="")
