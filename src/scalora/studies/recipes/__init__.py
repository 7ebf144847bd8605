"""The paper's tables as recipes: a YAML file each, with its sources, its figures and what is not published."""
